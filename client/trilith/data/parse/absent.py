"""Features that a parser is asked for and no record has: found by the files' columns at once, or by many records."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, TypeAlias

from trilith.data.messages import HINT, is_tf_example, message_of
from trilith.data.records import Kind, Records
from trilith.errors import DataError, InvalidRequestError

__all__ = ["Absent", "AbsentFeatures", "Parsing", "SourceColumns", "check_absent"]

Absent: TypeAlias = Literal["raise", "warn", "allow"]
"""What to do about features that no record has."""

_ENOUGH = 10_000
_LOOKED_AT = 100
_LOG = logging.getLogger(__name__)


def check_absent(absent: str | None) -> None:
    """Refuse what is no `Absent`."""
    if absent not in (None, "raise", "warn", "allow"):
        raise InvalidRequestError(f"absent={absent!r} is none of 'raise', 'warn' and 'allow'")


class SourceColumns:
    """The columns of the files that an iterator reads; shared by its stages.

    Attributes:
        plain: Whether some records come from elsewhere, where no columns are known.
    """

    def __init__(self) -> None:
        self.plain = False
        self._found: dict[str, str] = {}
        self._rest: list[Iterator[Mapping[str, str] | None]] = []
        self._looking = threading.Lock()

    def opened(self, available: Mapping[str, str] | None) -> None:
        """Note the columns of a file, each with why it cannot be read, if so; None for a file that has none."""
        if available is None:
            self.plain = True
        else:
            self._found.update(available)

    def expect(self, rest: Iterator[Mapping[str, str] | None]) -> None:
        """Say how the columns of files that were not opened yet are found, file after file."""
        self._rest.append(rest)

    def known(self) -> dict[str, str]:
        """What is known without opening anything more."""
        return dict(self._found)

    def more(self) -> bool:
        """Open one more file that was not opened yet, to know its columns; False if there is none."""
        with self._looking:
            while self._rest:
                try:
                    available = next(self._rest[0])
                except StopIteration:
                    del self._rest[0]
                    continue
                self.opened(available)
                return True
        return False


class Parsing(Protocol):
    """A parser that knows which features it never saw."""

    @property
    def unseen(self) -> Mapping[str, tuple[str, ...]]:
        """Outputs whose feature no record had so far, with the names that it could have."""


class AbsentFeatures:
    """Watches a parser.

    A name that is no column of any file read is told with the first batch. In records without columns a feature may be
    rare, so one is told when 10,000 records had it not, or all that there are.

    Args:
        parser: Which.
        columns: Of the files read.
        absent: What to do; None raises for columns and warns about records without columns.
    """

    def __init__(self, parser: Parsing, columns: SourceColumns, absent: Absent | None = None) -> None:
        self._parser = parser
        self._columns = columns
        self._absent = absent
        self._done = absent == "allow"
        self._checked = False
        self._records = 0
        self._last: Records | None = None

    def look(self, records: Records) -> None:
        """Check behind a batch that was made of some records."""
        if self._done or not len(records):
            return
        unseen = self._parser.unseen
        if not unseen:
            self._done, self._last = True, None
            return
        if not self._checked and not self._columns.plain and self._columns.known():
            self._check_columns(unseen)
        elif not self._checked and self._columns.plain and is_tf_example(records.payload(0)):
            self._done = True  # which can look like Examples without any of the features
            raise DataError(f"{records.where(0)}: no feature of those asked for is there; {HINT}")
        self._checked = True
        self._records += len(records)
        self._last = records
        if self._records >= _ENOUGH:
            self.end()

    def end(self) -> None:
        """Check when all records were read, or enough."""
        if self._done or self._last is None:
            return
        self._done = True
        records, self._last = self._last, None
        unseen = self._unknown(self._parser.unseen, {} if self._columns.plain else self._columns.known())
        if unseen:
            held = _features_of(records)
            self._tell(
                f"{_list(unseen)}: none of {self._records} records has it; there are {held}",
                self._absent or "warn",
            )

    def _check_columns(self, unseen: Mapping[str, tuple[str, ...]]) -> None:
        while missing := self._unknown(unseen, columns := self._columns.known()):
            if self._columns.plain:
                return
            if not self._columns.more():
                self._done = True
                reasons = [columns[name] for names in missing.values() for name in names if columns.get(name)]
                what = reasons[0] if reasons else f"no column of the files read; there are {sorted(columns)}"
                # A label is called so whatever the output is called: a column named like the output is what was meant.
                meant = [out for out, names in missing.items() if out not in names and columns.get(out) == ""]
                if meant and not reasons:
                    what += f"; Dense() reads {meant[0]!r} as numbers, Label() takes the label alone"
                self._tell(f"{_list(missing)}: {what}", self._absent or "raise")
                return

    def _unknown(self, unseen: Mapping[str, tuple[str, ...]], columns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        there = {_folded(name) for name, reason in columns.items() if not reason}
        return {out: names for out, names in unseen.items() if not there.intersection(map(_folded, names))}

    def _tell(self, what: str, absent: Absent) -> None:
        if absent == "raise":
            raise InvalidRequestError(f"{what}. Is a name misspelt? parse(..., absent='allow') takes it as empty")
        _LOG.warning("%s. Is a name misspelt?", what)


def _folded(name: str) -> str:
    """LineId columns are found whatever their case."""
    return name.lower() if name.startswith("__") else name


def _list(unseen: Mapping[str, tuple[str, ...]]) -> str:
    """Names for messages: what is looked for, and for which output where that is called otherwise."""
    return ", ".join(
        repr(names[0]) if names[0] == out else f"{' or '.join(map(repr, names))} (for {out!r})"
        for out, names in unseen.items()
    )


def _features_of(records: Records) -> str:
    """The names of features in some of the records, for messages."""
    found: dict[str, None] = {}
    for index in range(min(len(records), _LOOKED_AT)):
        try:
            message: Any = message_of(records.payload(index), records.kind)
        except DataError:
            continue
        field = {Kind.INSTANCE: "feature", Kind.EXAMPLE: "named_feature"}.get(records.kind, "named_feature_list")
        found |= dict.fromkeys(each.name for each in getattr(message, field))
    names = sorted(found)
    return f"{names[:50]}{' and more' if len(names) > 50 else ''}" if names else "no named features at all"
