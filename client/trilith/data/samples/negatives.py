"""Sampled negatives: rows made of a positive's user side and another item's side, in front of the positive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trilith.data.messages import RESERVED, message_of, promote
from trilith.data.records import Kind, Records
from trilith.data.samples.item_pool import ItemPool, PooledItem
from trilith.data.samples.rows import integers
from trilith.errors import DataError, InvalidRequestError

__all__ = ["NegativeConfig", "NegativeSampler"]

NO_ACTION = -99999
DEFAULT_CHANNEL = 3
_EPSILON = 1e-5
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativeConfig:
    """How negatives are made.

    Attributes:
        neg_num: Negatives per positive.
        per_channel: Whether items are pooled by channel.
        channel_feature: Where a row's channel is: Instances: a v1 slot, as number or text (3 if empty); Examples: a
            feature. A row without it belongs to channel 3, and channel 0 takes no part.
        item_features: The item side: v1 slots of flat fids of Instances, features of Examples.
        start_num: Items that a channel must exceed before anything is drawn from it.
        max_item_num: Most items of a channel.
        positive_label: Rows with this label are positive ...
        label_index: ... at this place ...
        positive_actions: ... unless actions are given: then a row is positive whose most prior action is one of them.
        action_priority: Actions such as "2,7,0", the first being the most prior.
        negative_label: Label of generated rows.
        negative_action: Only action of generated rows; -99999 keeps the positive's.
        index_feature: Slot or feature whose fid is the item id; empty takes line_id.item_id.
        throw_origin: Give out generated rows only.
        throw_origin_neg: Drop original rows that are not positive.
        cache_only_pos: Only positives are pooled ...
        cache_negative_actions: ... and rows that have any of these actions.
        real_neg_instance_weight: Weight of original rows that are not positive; 1 if not above 0.
        sampled_neg_instance_weight: Weight of generated rows, if above 0.
        unbias_sampled_neg: Else whether the weight is by how young and how rarely drawn an item is, rather than 1.
        origin_neg_in_pool_proba: Chance of a row that is not positive to be pooled, if below 1.
        neg_sample_declay_factor: Exponent of an item's youth in that weight.
        easy_hard_ratio: With per_channel, chance of drawing from any channel, by its size, rather than the row's own.
    """

    neg_num: int = 1
    per_channel: bool = False
    channel_feature: str | int = ""
    item_features: Sequence[str | int] = ()
    start_num: int = 500
    max_item_num: int = 100_000
    positive_label: float = 1
    label_index: int = 0
    positive_actions: Sequence[int] = ()
    action_priority: str = ""
    negative_label: float = -1
    negative_action: int = NO_ACTION
    index_feature: str | int = ""
    throw_origin: bool = False
    throw_origin_neg: bool = False
    cache_only_pos: bool = True
    cache_negative_actions: Sequence[int] = ()
    real_neg_instance_weight: float = 1.0
    sampled_neg_instance_weight: float = -1.0
    unbias_sampled_neg: bool = True
    origin_neg_in_pool_proba: float = 1.0
    neg_sample_declay_factor: float = 1.0
    easy_hard_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("neg_num", 1), ("start_num", 0), ("max_item_num", 1), ("label_index", 0)):
            if getattr(self, name) < least:
                raise InvalidRequestError(f"{name}={getattr(self, name)} is below {least}")
        both = set(self.positive_actions) & set(self.cache_negative_actions)
        if both:
            raise InvalidRequestError(f"actions {sorted(both)} are both positive_actions and cache_negative_actions")
        if not 0 <= self.easy_hard_ratio <= 1:
            raise InvalidRequestError(f"easy_hard_ratio={self.easy_hard_ratio} is outside 0..1")
        integers(self.action_priority, "action_priority")


class _Rows:
    """What differs between Instances and Examples: where keys and the item side are."""

    def __init__(self, config: NegativeConfig) -> None:
        self.config = config

    def channel(self, message: Any) -> int | None:
        raise NotImplementedError

    def index(self, message: Any) -> int | None:
        raise NotImplementedError

    def item(self, message: Any, gid: int) -> PooledItem:
        raise NotImplementedError

    def base(self, message: Any) -> tuple[Any, Sequence[int]]:
        """A message with the user side and what all generated rows share, and the user side's flat fids."""
        raise NotImplementedError

    def generated(self, base: tuple[Any, Sequence[int]], item: PooledItem) -> bytes:
        raise NotImplementedError


class _Instances(_Rows):
    def __init__(self, config: NegativeConfig) -> None:
        super().__init__(config)
        self._items = {_slot(each, "item_features") for each in config.item_features}
        self._channel = _slot(config.channel_feature, "channel_feature") if config.channel_feature != "" else 3
        self._index = _slot(config.index_feature, "index_feature") if config.index_feature != "" else None

    def channel(self, message: Any) -> int | None:
        return _last(message.fid, self._channel)

    def index(self, message: Any) -> int | None:
        return None if self._index is None else _last(message.fid, self._index)

    def item(self, message: Any, gid: int) -> PooledItem:
        return PooledItem(gid, tuple(fid for fid in message.fid if fid >> 54 in self._items))

    def base(self, message: Any) -> tuple[Any, Sequence[int]]:
        made = type(message)()
        made.CopyFrom(message)
        return made, [fid for fid in message.fid if fid >> 54 not in self._items]

    def generated(self, base: tuple[Any, Sequence[int]], item: PooledItem) -> bytes:
        message, user = base
        message.fid[:] = [*user, *item.fids]
        return message.SerializeToString()  # type: ignore[no-any-return]


class _Examples(_Rows):
    def __init__(self, config: NegativeConfig) -> None:
        super().__init__(config)
        self._items = {str(each) for each in config.item_features}
        self._channel = str(config.channel_feature)
        self._index = str(config.index_feature)

    def channel(self, message: Any) -> int | None:
        return _first_fid(message, self._channel)

    def index(self, message: Any) -> int | None:
        return _first_fid(message, self._index) if self._index else None

    def item(self, message: Any, gid: int) -> PooledItem:
        mine = (each for each in message.named_feature if each.name in self._items)
        return PooledItem(gid, (), tuple(each.SerializeToString() for each in mine))

    def base(self, message: Any) -> tuple[Any, Sequence[int]]:
        made = type(message)(line_id=message.line_id, label=message.label)
        made.named_feature.extend(each for each in message.named_feature if each.name not in self._items)
        return made, ()

    def generated(self, base: tuple[Any, Sequence[int]], item: PooledItem) -> bytes:
        message, _ = base
        user = len(message.named_feature)
        for feature in item.features:
            message.named_feature.add().ParseFromString(feature)
        payload: bytes = message.SerializeToString()
        del message.named_feature[user:]
        return payload


class NegativeSampler:
    """Turns records, in their order, into records with negatives; remembers items.

    Draws depend on the seed and the number of draws before, so the same records give the same negatives.

    Args:
        config: What to make.
        pool: Where items are kept.
        seed: Decides the draws.
        lost: Damaged records are left out, and this is called with their number; without it they are errors.
    """

    def __init__(
        self,
        config: NegativeConfig,
        pool: ItemPool | None = None,
        *,
        seed: int = 0,
        lost: Callable[[int], None] | None = None,
    ) -> None:
        self.config = config
        self._lost = lost
        self.pool = pool if pool is not None else ItemPool(config.start_num, config.max_item_num)
        self.drawn = 0
        self._seed = seed & _MASK
        self._positive_actions = frozenset(config.positive_actions)
        self._pooled_actions = frozenset(config.cache_negative_actions)
        self._ranks: dict[int, int] = {}
        for rank, action in enumerate(integers(config.action_priority, "action_priority")):
            self._ranks.setdefault(action, rank)
        self._rows: dict[Kind, _Rows] = {}

    def __call__(self, records: Records) -> Records:
        """The original records that stay, each positive behind its negatives."""
        rows = self._rows_of(records.kind)
        payloads: list[bytes] = []
        came_from: list[int] = []
        for index in range(len(records)):
            before = len(payloads)
            try:
                message = _read(records, index)
            except DataError:
                if self._lost is None:
                    raise
                self._lost(1)
                continue
            self._row(rows, message, payloads)
            came_from += [index] * (len(payloads) - before)
        made = Records.of(payloads, records.kind)
        return records.take(came_from).replace(buffer=made.buffer, offsets=made.offsets, lengths=made.lengths)

    def _rows_of(self, kind: Kind) -> _Rows:
        if kind not in self._rows:
            makers: dict[Kind, Callable[[NegativeConfig], _Rows]] = {
                Kind.INSTANCE: _Instances,
                Kind.EXAMPLE: _Examples,
            }
            if kind not in makers:
                raise InvalidRequestError(f"negatives are made of instances or examples, not of {str(kind)!r}")
            self._rows[kind] = makers[kind](self.config)
        return self._rows[kind]

    def _row(self, rows: _Rows, message: Any, out: list[bytes]) -> None:
        config = self.config
        positive = self._is_positive(message)
        channel = DEFAULT_CHANNEL
        if config.per_channel:
            found = rows.channel(message)
            channel = DEFAULT_CHANNEL if found is None else found
        if channel:
            if positive or self._is_pooled(message):
                gid = rows.index(message)
                self.pool.add(channel, rows.item(message, message.line_id.item_id if gid is None else gid))
            if positive:
                self._generate(rows, message, channel, out)
        if not config.throw_origin and (positive or not config.throw_origin_neg):
            weight = config.real_neg_instance_weight
            message.instance_weight = 1.0 if positive or weight <= _EPSILON else weight
            out.append(message.SerializeToString())

    def _is_positive(self, message: Any) -> bool:
        if self._positive_actions:
            actions = message.line_id.actions
            if not actions:
                return False
            last = len(self._ranks)
            return min(actions, key=lambda action: self._ranks.get(action, last)) in self._positive_actions
        at = self.config.label_index
        return at < len(message.label) and message.label[at] == self.config.positive_label

    def _is_pooled(self, message: Any) -> bool:
        """Whether a row that is not positive is pooled."""
        config = self.config
        if config.cache_only_pos and self._pooled_actions.isdisjoint(message.line_id.actions):
            return False
        chance = config.origin_neg_in_pool_proba
        return not 0 <= chance < 1 or self._uniform() < chance

    def _generate(self, rows: _Rows, message: Any, channel: int, out: list[bytes]) -> None:
        config = self.config
        base = None
        for _ in range(config.neg_num):
            drawn = self.pool.sample(self._other_channel(channel), self._bits())
            if drawn is None:
                return
            item, time_factor, freq_factor = drawn
            if base is None:
                base = rows.base(message)
                if config.label_index < len(base[0].label):
                    base[0].label[config.label_index] = config.negative_label
                if config.negative_action != NO_ACTION:
                    base[0].line_id.actions[:] = [config.negative_action]
            base[0].line_id.item_id = item.gid
            base[0].instance_weight = self._weight(time_factor, freq_factor)
            out.append(rows.generated(base, item))

    def _other_channel(self, channel: int) -> int:
        config = self.config
        if not config.per_channel or config.easy_hard_ratio <= 0 or len(self.pool.channels) < 2:
            return channel
        return self.pool.channel_by_size(self._bits()) if self._uniform() < config.easy_hard_ratio else channel

    def _weight(self, time_factor: float, freq_factor: float) -> float:
        config = self.config
        if config.sampled_neg_instance_weight > _EPSILON:
            return config.sampled_neg_instance_weight
        if not config.unbias_sampled_neg:
            return 1.0
        youth = float(time_factor**config.neg_sample_declay_factor)
        return 1.0 + config.neg_num * youth * freq_factor

    def _bits(self) -> int:
        """64 random bits: SplitMix64 at the place of this draw."""
        self.drawn += 1
        bits = (self.drawn * 0x9E3779B97F4A7C15 + self._seed * 0xD1342543DE82EF95) & _MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
        return bits ^ (bits >> 31)

    def _uniform(self) -> float:
        return (self._bits() >> 11) / (1 << 53)


def _read(records: Records, index: int) -> Any:
    """A record as a message whose reserved features have become fields."""
    try:
        message: Any = message_of(records.payload(index), records.kind)
        if records.kind is Kind.EXAMPLE and any(each.name in RESERVED for each in message.named_feature):
            promote(message)
            kept = [each for each in message.named_feature if each.name not in RESERVED]
            del message.named_feature[:]
            message.named_feature.extend(kept)
    except DataError as error:
        raise DataError(f"{records.where(index)}: {error}") from None
    return message


def _last(fids: Sequence[int], slot: int) -> int | None:
    """The last fid of a v1 slot."""
    return next((fid for fid in reversed(fids) if fid >> 54 == slot), None)


def _first_fid(example: Any, name: str) -> int | None:
    for each in example.named_feature:
        if each.name == name:
            held = each.feature
            fids = held.fid_v1_list.value or held.fid_v2_list.value
            return fids[0] if fids else None
    return None


def _slot(value: str | int, name: str) -> int:
    try:
        slot = int(value)
    except ValueError:
        raise InvalidRequestError(f"{name}={value!r}: of instances, v1 slots are given as numbers") from None
    if not 0 <= slot < 1024:
        raise InvalidRequestError(f"{name}={value!r} is no v1 slot, 0..1023")
    return slot
