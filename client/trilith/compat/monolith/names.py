"""Names of slots and ids of columns: registries that belong to whoever reads data, not to the process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trilith.compat.monolith.feature_list import FeatureList
from trilith.data.fids import MAX_SLOTS
from trilith.errors import InvalidRequestError

__all__ = ["FeatureNameMapper", "SlotNames"]


class SlotNames:
    """Which feature name belongs to which slot.

    Args:
        tob: Whether slots without a name of their own are called `fc_slot_N` rather than `slot_N`.
        feature_list: Where names and slots are looked up that nobody registered.
    """

    def __init__(self, *, tob: bool = False, feature_list: FeatureList | None = None) -> None:
        self.tob = tob
        self._feature_list = feature_list
        self._slots: dict[str, int] = {}
        self._assigned: dict[str, int] = {}

    def register(self, slots: Iterable[int] | Mapping[str, int]) -> None:
        """Add names to the registry: slots by name, or slots under their default names."""
        named = dict(slots) if isinstance(slots, Mapping) else {self.default_name(slot): slot for slot in slots}
        for name, slot in named.items():
            if not 0 <= slot < MAX_SLOTS:
                raise InvalidRequestError(f"{name!r}: slot {slot} is outside 0..{MAX_SLOTS - 1}")
        self._slots.update(named)

    def default_name(self, slot: int) -> str:
        """What a slot is called if nobody named it."""
        return f"fc_slot_{slot}" if self.tob else f"slot_{slot}"

    def name_of(self, slot: int) -> str:
        """Name of a slot: the feature list's, else its default name."""
        feature = self._feature_list.get(slot) if self._feature_list is not None else None
        return self.default_name(slot) if feature is None else feature.feature_name

    def slot_of(self, name: str) -> int | None:
        """Slot of a name: registered, of the feature list, the number of `slot_N` or `fc_slot_N`, or the next free one.

        Names without a number are given 1, 2, 3, … in the order they are first asked for; None is for a `slot_` name
        that does not end in a number.
        """
        if name in self._slots:
            return self._slots[name]
        feature = self._feature_list.get(name) if self._feature_list is not None else None
        if feature is not None and feature.slot is not None:
            return feature.slot
        if name.startswith(("slot_", "fc_slot_")):
            number = name.rsplit("_", 1)[-1]
            return int(number) if number.isascii() and number.isdigit() else None
        return self._assigned.setdefault(name, len(self._assigned) + 1)


class FeatureNameMapper:
    """Which columns of ExampleBatches are wanted, by name or by id; registrations and the mapping come in any order.

    Attributes:
        enabled: Whether the mapper is to be used at all.
    """

    def __init__(self, *, enabled: bool = False) -> None:
        self.enabled = enabled
        self._names: set[str] = set()
        self._id_pairs: set[tuple[int, int]] = set()
        self._ids: dict[str, int] | None = None
        self._names_of: dict[int, tuple[str, ...]] = {}

    @property
    def available(self) -> bool:
        """Whether the mapper is switched on and has a mapping."""
        return self.enabled and self._ids is not None

    def register_names(self, names: Iterable[str]) -> bool:
        """Want columns by name; False if there is a mapping and it lacks one (the others are registered)."""
        names = list(names)
        self._names.update(names)
        return self._ids is None or all(name in self._ids for name in names)

    def register_ids(self, pairs: Iterable[Sequence[int]]) -> bool:
        """Want columns by pairs of ids, either of which may be the column's; False if a mapping knows neither."""
        wanted = [(first, second) for first, second in pairs]
        self._id_pairs.update(wanted)
        return self._ids is None or all(self._knows(pair) for pair in wanted)

    def set_mapping(self, ids: Mapping[str, int], names: Mapping[int, Sequence[str]] | None = None) -> bool:
        """Say which ids columns have; False, and there is no mapping, if something registered is not in it.

        Args:
            ids: Id by name.
            names: Names by id; what follows from `ids`, if left out.
        """
        self._ids = dict(ids)
        if names is None:
            grouped: dict[int, list[str]] = {}
            for name, number in ids.items():
                grouped.setdefault(number, []).append(name)
            names = grouped
        self._names_of = {number: tuple(each) for number, each in names.items()}
        if all(name in self._ids for name in self._names) and all(self._knows(pair) for pair in self._id_pairs):
            return True
        self._ids, self._names_of = None, {}
        return False

    def find(self, name: str) -> int | None:
        """Id of a column that is wanted; None for any other."""
        if self._ids is None or name not in self._ids:
            return None
        by_id = any(name in self._names_of.get(number, ()) for pair in self._id_pairs for number in pair)
        return self._ids[name] if name in self._names or by_id else None

    def _knows(self, pair: tuple[int, int]) -> bool:
        return any(number in self._names_of for number in pair)
