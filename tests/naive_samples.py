"""Slow twins of the sample ops: each rule once more, for one message, as plain loops."""

from __future__ import annotations

import numpy as np

INVALID_LABEL = float(np.finfo(np.float32).min)
MASK64 = 2**64 - 1


def fids_of(message) -> list[int]:
    if message.DESCRIPTOR.name == "Instance":
        return list(message.fid)
    found = []
    for named in message.named_feature:
        kind = named.feature.WhichOneof("type")
        if kind in ("fid_v1_list", "fid_v2_list"):
            found += getattr(named.feature, kind).value
    return found


def slots_of(message) -> set[int]:
    if message.DESCRIPTOR.name == "Instance":
        flat = {fid >> 54 for fid in message.fid}
        return flat | {fid >> 48 & 0x7FFF for feature in message.feature for fid in feature.fid}
    found = set()
    for named in message.named_feature:
        found |= {fid >> 54 for fid in named.feature.fid_v1_list.value}
        found |= {fid >> 48 & 0x7FFF for fid in named.feature.fid_v2_list.value}
    return found


def filter_by_fids(
    message, filter_fids=(), has_fids=(), select_fids=(), select_slots=(), has_actions=(), req_time_min=0
) -> bool:
    fids, slots, actions = set(fids_of(message)), slots_of(message), set(message.line_id.actions)
    return (
        message.line_id.req_time >= req_time_min
        and not fids & set(filter_fids)
        and (not has_fids or bool(fids & set(has_fids)))
        and set(select_fids) <= fids
        and set(select_slots) <= slots
        and (not has_actions or bool(actions & set(has_actions)))
    )


def compare(op, value, operands) -> bool:
    """A relation of one number or byte string; single operators use the first operand."""
    first = operands[0] if operands else None
    match op:
        case "gt":
            return value > first
        case "ge":
            return value >= first
        case "eq":
            return value == first
        case "lt":
            return value < first
        case "le":
            return value <= first
        case "neq":
            return value != first
        case "between":
            return first <= value < operands[1]
        case "in":
            return value in operands
        case "not-in":
            return value not in operands
        case "startswith":
            return any(value.startswith(each) for each in operands)
        case "endswith":
            return any(value.endswith(each) for each in operands)
    raise AssertionError(op)


def compare_sets(op, values, operands) -> bool:
    common = set(values) & set(operands)
    return {"any": bool(common), "all": common == set(operands), "diff": not common}[op]


def filter_by_feature_value(example, name, op, operands, field_type, keep_empty) -> bool:
    found = [named.feature for named in example.named_feature if named.name == name]
    kind = found[-1].WhichOneof("type") if found else None
    wanted = f"{field_type}_list"
    if kind != wanted:
        return keep_empty
    values = list(getattr(found[-1], wanted).value)
    if op in ("any", "all", "diff"):
        return compare_sets(op, values, operands) if values else keep_empty
    if len(values) != 1:
        return keep_empty
    value = values[0]
    if field_type in ("float", "double"):
        operands = [float(np.float32(each)) for each in operands]
        if op in ("in", "not-in"):
            value = float(np.float32(value))
    return compare(op, value, operands)


def filter_by_label(labels, thresholds, filter_equal) -> bool:
    if len(labels) < len(thresholds):
        return False
    thresholds = [float(np.float32(each)) for each in thresholds]
    pairs = zip(labels, thresholds, strict=False)
    return any(label > bound or (label == bound and not filter_equal) for label, bound in pairs)


def most_prior(actions, priorities) -> int | None:
    if not actions:
        return None
    listed = [priorities.index(each) for each in actions if each in priorities]
    return priorities[min(listed)] if listed else actions[0]


def add_label(labels, actions, tasks, negative_value) -> list[float]:
    """Labels after AddLabel where every rate is 0 or 1."""
    labels = list(labels)
    if labels and labels[0] <= 0:
        labels[0] = INVALID_LABEL
    for positive, negative, rate in tasks:
        if set(actions) & set(positive):
            labels.append(1.0)
        elif (negative and not set(actions) & set(negative)) or rate == 0:
            labels.append(INVALID_LABEL)
        else:
            labels.append(negative_value)
    return labels


def scatter_label(labels, channel, places) -> list[float]:
    made = [INVALID_LABEL] * (max(places.values()) + 1)
    if channel in places:
        made[places[channel]] = labels[0] if labels else INVALID_LABEL
    return made


def multi_label_gen(labels, actions, head, places, positive, negative, priorities, use_origin) -> list[float]:
    made = [INVALID_LABEL] * (max(places.values()) + 1)
    if use_origin:
        value = labels[0] if labels else INVALID_LABEL
    else:
        top = most_prior(actions, priorities)
        value = 1.0 if top in positive else 0.0 if top in negative else INVALID_LABEL
    if head in places:
        made[places[head]] = value
    return made


def special_strategy(strategies, listed, conf, keep_empty) -> tuple[bool, float | None]:
    """Whether a sample stays where every rate is 0 or 1, and its new first label."""
    if not strategies:
        return keep_empty, None
    for strategy in listed:
        if strategy in strategies:
            rate, label = conf.get(strategy, (1.0, None))
            return rate == 1.0, label
    return False, None


def reweight(labels, actions, pre_actions, priorities, table) -> tuple[int, list[float]]:
    """Copies and labels by section 8."""

    def priority(listed):
        if not listed:
            return 2000
        places = [priorities.index(each) for each in listed if each in priorities]
        return min(places) + 1 if places else 1000

    def top(listed):
        places = [priorities.index(each) for each in listed if each in priorities]
        return priorities[min(places)] if places else None

    def count(listed):
        total = 1 if listed else 0
        for action in listed:
            if action in priorities and action != top(listed):
                continue
            if action in table:
                total *= table[action][0]
        return total

    labels = list(labels)
    if not labels:
        return 0, labels
    now, before = priority(actions), priority(pre_actions)
    if before > now:
        if top(actions) in table:
            labels[0] = float(table[top(actions)][1])
        if top(pre_actions) not in table:
            return count(actions), labels
        if table[top(pre_actions)][1] != int(labels[0]):
            return count(pre_actions) + count(actions), labels
        if count(pre_actions) > count(actions):
            labels[0] = -labels[0]
            return count(pre_actions) - count(actions), labels
        return count(actions) - count(pre_actions), labels
    return (1 if now == before == 2000 else 0), labels


def feature_combine(a, b, slot) -> list[list[int]]:
    def signed(value):
        value &= MASK64
        return value - 2**64 if value >> 63 else value

    rows = []
    for left, right in zip(a, b, strict=True):
        row = []
        for x in left:
            for y in right:
                product = signed(x) * signed(y)
                signature = (product >> 64 & MASK64) ^ (product & MASK64)
                row.append(signed(slot << 48 | signature & (2**48 - 1)))
        rows.append(row)
    return rows
