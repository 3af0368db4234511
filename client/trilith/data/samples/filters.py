"""Ops that decide which samples stay: by fids, by LineId values, by feature values, by labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.line_ids import LineField, line_field
from trilith.data.records import Kind
from trilith.data.samples.chunk import Needs, SampleOp, Samples
from trilith.data.samples.relations import Bits, Domain, Relation, check_operator, count_distinct, load_operands
from trilith.data.samples.rows import at
from trilith.errors import InvalidRequestError

__all__ = [
    "FilterByFeatureValue",
    "FilterByFids",
    "FilterByLabel",
    "FilterByValue",
    "line_domain",
    "relation_of_line_field",
]

BoolArray = npt.NDArray[np.bool_]
_FEATURE_DOMAINS = {each.value: each for each in (Domain.INT64, Domain.FLOAT, Domain.DOUBLE, Domain.BYTES)}


@dataclass(frozen=True, kw_only=True)
class FilterByFids(SampleOp):
    """Keep samples by the fids, slots and actions they have; every condition given must hold.

    The fids of an Instance are its flat ones, those of an Example all of its v1 and v2 lists; the slots of an Instance
    are also those of its features' fids.

    Attributes:
        filter_fids: None of these may be there.
        has_fids: One of these must be.
        select_fids: All of these must be.
        select_slots: The sample must have a fid in every one of these.
        has_actions: One of these must be among the actions.
        req_time_min: Smallest request time; a negative one is always dropped by the default.
    """

    filter_fids: Sequence[int] = ()
    has_fids: Sequence[int] = ()
    select_fids: Sequence[int] = ()
    select_slots: Sequence[int] = ()
    has_actions: Sequence[int] = ()
    req_time_min: int = 0

    def __post_init__(self) -> None:
        bounds = {"filter_fids": (0, 2**64), "has_fids": (0, 2**64), "select_fids": (0, 2**64)}
        bounds |= {"select_slots": (1, 2**15), "has_actions": (-(2**31), 2**31)}
        for name, (lowest, end) in bounds.items():
            values = tuple(map(int, getattr(self, name)))
            outside = [each for each in values if not lowest <= each < end]
            if outside:
                raise InvalidRequestError(f"{name} has {outside[0]}; it must be within {lowest}..{end - 1}")
            object.__setattr__(self, name, values)

    @property
    def needs(self) -> Needs:
        fids = bool(self.filter_fids or self.has_fids or self.select_fids)
        line = {"req_time", "actions"} if self.has_actions else {"req_time"}
        return Needs(fids=fids, slots=bool(self.select_slots), line_id=frozenset(line))

    def apply(self, samples: Samples) -> BoolArray:
        keep = samples.numbers("req_time") >= self.req_time_min
        if self.filter_fids:
            keep &= count_distinct(_sorted(self.filter_fids), *samples.fids) == 0
        if self.has_fids:
            keep &= count_distinct(_sorted(self.has_fids), *samples.fids) > 0
        if self.select_fids:
            wanted = _sorted(self.select_fids)
            keep &= count_distinct(wanted, *samples.fids) == wanted.size
        if self.select_slots:
            wanted = _sorted(self.select_slots)
            keep &= count_distinct(wanted, *samples.slots) == wanted.size
        if self.has_actions:
            keep &= count_distinct(_sorted(self.has_actions), Bits(samples.rows("actions"))) > 0
        return keep


def _sorted(values: Sequence[int]) -> npt.NDArray[np.uint64]:
    return np.unique(np.array([each & 0xFFFFFFFFFFFFFFFF for each in values], np.uint64))


# ---- values ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Compared(SampleOp):
    """What the two filters by value share: an operator with an operand, or with a file of operands.

    Attributes:
        field_name: What is compared.
        op: One of `relations.OPERATORS`.
        operand: A number, a string, or a sequence of them.
        operand_filepath: A file with a serialized FilterValues instead, for in and not-in; read when first used.
        keep_empty: What becomes of samples that have nothing to compare.
    """

    field_name: str
    op: str
    operand: Any = None
    operand_filepath: str = field(default="", kw_only=True)
    keep_empty: bool = field(default=False, kw_only=True)

    def _check(self, domain: Domain, *, repeated: bool, files: bool) -> None:
        if (self.operand is None) == (not self.operand_filepath):
            given = "both are" if self.operand_filepath else "neither is"
            raise InvalidRequestError(
                f"{self.field_name!r} {self.op}: give operand or operand_filepath, one of them; {given} given"
            )
        if not self.operand_filepath:
            _ = self.relation
            return
        check_operator(self.field_name, self.op, domain, repeated=repeated)
        if self.op not in ("in", "not-in"):
            raise InvalidRequestError(
                f"op of {self.field_name!r} is {self.op!r}; operand_filepath is for in and not-in"
            )
        if not files:
            raise InvalidRequestError(
                f"operand_filepath of {self.field_name!r}: a {domain} has no list in FilterValues"
            )

    @property
    def relation(self) -> Relation:
        """The relation, with its operands read."""
        raise NotImplementedError

    def _loaded(self, domain: Domain) -> Relation:
        operands = load_operands(self.operand_filepath, self.field_name, domain)
        return Relation(operator=self.op, domain=domain, operands=operands)


def line_domain(described: LineField) -> Domain:
    """The type in which the values of a field of LineId are compared; bool fields are refused."""
    if described.is_bool:
        raise InvalidRequestError(f"field_name is {described.name!r}, a bool; relations compare numbers and strings")
    if described.dtype.kind == "O":
        return Domain.BYTES
    if described.dtype.kind == "f":
        return Domain.FLOAT if described.dtype == np.float32 else Domain.DOUBLE
    return Domain.UINT64 if described.dtype == np.uint64 else Domain.INT64


def relation_of_line_field(described: LineField, operator: str, operand: Any) -> Relation:
    """The relation between a field of LineId and an operand as a user gives it."""
    domain = line_domain(described)
    # Upstream takes one operand for a list without options (special_strategies); a list does no harm.
    return Relation.typed(described.name, operator, operand, domain, repeated=described.repeated)


@dataclass(frozen=True)
class FilterByValue(_Compared):
    """Keep samples by a field of their LineId; unset scalars compare with their default.

    Attributes:
        field_name: Of LineId.
        op: gt, ge, eq, lt, le, neq, between, in, not-in; for strings also startswith and endswith; for lists any, all
            and diff, and no other.
        operand: A number or string; a list for in, not-in and between, which is below its second operand. Floats are
            compared as float32, uid and its like as unsigned, strings bytewise.
        operand_filepath: See above.
        keep_empty: Whether samples whose list is empty stay.
    """

    def __post_init__(self) -> None:
        described = line_field(self.field_name)
        self._check(line_domain(described), repeated=described.repeated, files=True)

    @cached_property
    def relation(self) -> Relation:
        described = line_field(self.field_name)
        if self.operand_filepath:
            return self._loaded(line_domain(described))
        return relation_of_line_field(described, self.op, self.operand)

    @property
    def needs(self) -> Needs:
        return Needs(line_id=frozenset((self.field_name,)))

    def apply(self, samples: Samples) -> BoolArray:
        if not line_field(self.field_name).repeated:
            return samples.relation(self.field_name, self.relation)
        rows = samples.rows(self.field_name)
        return np.where(rows.lengths > 0, self.relation.of_sets(rows), self.keep_empty)


@dataclass(frozen=True)
class FilterByFeatureValue(_Compared):
    """Keep Examples by the value of a named feature, the last of that name.

    A list of exactly one value of the given type is compared; any, all and diff take int64 lists of one value or more;
    of everything else, and of Examples without the feature, `keep_empty` decides.

    Attributes:
        field_name: Of the feature.
        op: As in `FilterByValue`; any, all and diff for int64.
        operand: As in `FilterByValue`, for in and not-in also a list of floats. A double compares with the operand as
            float32.
        operand_filepath: See above; not for double.
        field_type: "int64", "float", "double" or "bytes".
        keep_empty: See above.
    """

    field_type: str = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.field_type not in _FEATURE_DOMAINS:
            raise InvalidRequestError(f"field_type is {self.field_type!r}; it can be {', '.join(_FEATURE_DOMAINS)}")
        if self._sets and self._domain is not Domain.INT64:
            raise InvalidRequestError(f"op of {self.field_name!r} is {self.op!r}, which needs field_type int64")
        self._check(self._domain, repeated=self._sets, files=self._domain is not Domain.DOUBLE)

    @property
    def _domain(self) -> Domain:
        return _FEATURE_DOMAINS[self.field_type]

    @property
    def _sets(self) -> bool:
        return self.op in ("any", "all", "diff")

    @cached_property
    def relation(self) -> Relation:
        if self.operand_filepath:
            return self._loaded(self._domain)
        return Relation.typed(
            self.field_name, self.op, self.operand, self._domain, repeated=self._sets, float_lists=True
        )

    @property
    def needs(self) -> Needs:
        return Needs(features=frozenset(((self.field_name, self._domain),)))

    def apply(self, samples: Samples) -> BoolArray:
        if samples.kind is not Kind.EXAMPLE:
            raise InvalidRequestError(f"features are filtered by value in Examples; these records are {samples.kind}s")
        found = samples.feature(self.field_name, self._domain)
        if self._sets:
            return np.where(found.lengths > 0, found.sets(self.relation), self.keep_empty)
        return np.where(found.lengths == 1, found.relation(self.relation), self.keep_empty)


# ---- labels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilterByLabel(SampleOp):
    """Keep samples one of whose labels is above its threshold.

    Attributes:
        thresholds: One per label from the first; samples with fewer labels go.
        filter_equal: Whether a label that equals its threshold is not enough.
    """

    thresholds: Sequence[float]
    filter_equal: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(map(float, self.thresholds)))

    @property
    def needs(self) -> Needs:
        return Needs(labels=True)

    def apply(self, samples: Samples) -> BoolArray:
        labels = samples.labels
        passes = np.zeros(len(samples), np.bool_)
        compare = np.greater if self.filter_equal else np.greater_equal
        for index, threshold in enumerate(self.thresholds):
            passes |= compare(at(labels, index, np.nan), np.float32(threshold))
        return passes & (labels.lengths >= len(self.thresholds))
