"""Where records come from: files, one after another or several in turns, and memory."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from trilith.data.formats.reading import Losses, Position, RecordReader, UnfitColumnsError, position_of
from trilith.data.pipeline.queue import FileDealer
from trilith.data.pipeline.stages import Stage, State
from trilith.data.records import Records
from trilith.errors import InvalidRequestError

__all__ = ["Cursor", "ListedFiles", "Memory", "Merging", "Reading", "Streaming", "add_losses", "take_in_turns"]

OpenFile: TypeAlias = Callable[[str, Position], RecordReader]


class ListedFiles:
    """The files of a list."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._next = 0
        self._mark = zlib.crc32("\n".join(self._names).encode())

    def take(self, claim: str = "") -> str | None:
        """See `FileDealer`."""
        if claim:
            return claim
        if self._next == len(self._names):
            return None
        self._next += 1
        return self._names[self._next - 1]

    def finish(self, name: str) -> None:
        """See `FileDealer`."""

    def state_dict(self) -> dict[str, Any]:
        """See `FileDealer`."""
        return {"next": self._next, "files": self._mark}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `FileDealer`."""
        if state["files"] != self._mark:
            raise InvalidRequestError(
                f"the state is of another list of files than these {len(self._names)}: {self._names[:3]}..."
            )
        self._next = state["next"]

    def close(self) -> None:
        """See `FileDealer`."""


class Cursor(ABC):
    """What gives chunks and is read record by record: the chunk at hand, and how far it has been taken."""

    def __init__(self) -> None:
        self.chunk: Records | None = None
        self.at = 0

    @abstractmethod
    def pull(self) -> Records | None:
        """The next chunk, None at the end."""

    @property
    def left(self) -> int:
        """Records of the chunk at hand that were not taken yet."""
        return 0 if self.chunk is None else len(self.chunk) - self.at

    def fill(self) -> bool:
        """Have at least one record at hand; False at the end."""
        while not self.left:
            self.chunk, self.at = self.pull(), 0
            if self.chunk is None:
                return False
        return True

    def take(self, count: int) -> Records:
        """The next `count` records of the chunk at hand."""
        assert self.chunk is not None
        self.at += count
        if self.at == count == len(self.chunk):
            return self.chunk
        return self.chunk.take(slice(self.at - count, self.at))


class _File(Cursor):
    """One open file."""

    def __init__(self, name: str, reader: RecordReader) -> None:
        super().__init__()
        self.name = name
        self.reader = reader

    def pull(self) -> Records | None:
        return next(self.reader, None)

    @property
    def position(self) -> Position:
        if self.chunk is not None and self.left:
            return position_of(self.chunk, self.at)
        return self.reader.position


class Reading:
    """Chunks of the records of files, some of which may be read in turns.

    Args:
        files: Which.
        opener: Opens one at a position.
        losses: Where what was skipped is added up.
        cycle_length: Files open at a time.
        block_length: Records of one file before it is the next one's turn.
        skip: Whether a file without the columns that are wanted is skipped and counted; if it is all files, that is
            still an error.
    """

    def __init__(
        self,
        files: FileDealer,
        opener: OpenFile,
        losses: Losses,
        *,
        cycle_length: int = 1,
        block_length: int = 1,
        skip: bool = False,
    ) -> None:
        self._files = files
        self._open = opener
        self._losses = losses
        self._block = block_length
        self._slots: list[_File | None] = [None] * cycle_length
        self._more = True
        self._skip = skip
        self._opened = False
        self._misfit: UnfitColumnsError | None = None

    def __next__(self) -> Records:
        return self._one_file() if len(self._slots) == 1 else self._in_turns()

    def _one_file(self) -> Records:
        while True:
            file = self._ready(0)
            if file is None:
                raise StopIteration
            return file.take(file.left)

    def _in_turns(self) -> Records:
        """One round, or as many at once as the chunks at hand allow, so that rounds cost little."""
        open_ = [file for number in range(len(self._slots)) if (file := self._ready(number)) is not None]
        if not open_:
            raise StopIteration
        return take_in_turns(open_, self._block)

    def _ready(self, number: int) -> _File | None:
        """The file of a slot with a record at hand; a finished one is replaced by the next."""
        while True:
            file = self._slots[number]
            if file is not None:
                if file.fill():
                    return file
                self._end(number, file)
            name = self._files.take() if self._more else None
            if name is None:
                self._more = False
                if self._misfit is not None and not self._opened:
                    raise self._misfit
                return None
            self._slots[number] = self._file(name, Position())
            if self._slots[number] is None:
                self._files.finish(name)

    def _file(self, name: str, start: Position) -> _File | None:
        """Open a file; None if it is skipped."""
        try:
            reader = self._open(name, start)
        except UnfitColumnsError as error:
            if not self._skip:
                raise
            self._misfit = error
            self._losses.add(f"{error}; the file is lost", 0)
            return None
        self._opened = True
        return _File(name, reader)

    def _end(self, number: int, file: _File) -> None:
        self._slots[number] = None
        add_losses(self._losses, file.reader.losses)
        file.reader.close()
        self._files.finish(file.name)

    def state(self) -> State:
        """See `Stage`."""
        slots: list[Any] = []
        for file in self._slots:
            if file is None:
                slots.append(None)
            else:
                at = file.position
                slots.append((file.name, at.records, at.offset))
        return {"files": self._files.state_dict(), "slots": tuple(slots), "more": self._more}

    def restore(self, state: State) -> None:
        """See `Stage`."""
        if len(state["slots"]) != len(self._slots):
            raise InvalidRequestError(
                f"the state has {len(state['slots'])} files open at a time, this dataset {len(self._slots)}"
            )
        self._files.load_state_dict(state["files"])
        self._more = state["more"]
        for number, slot in enumerate(state["slots"]):
            if slot is not None:
                name, records, offset = slot
                if self._files.take(claim=name) is not None:  # else another worker has it by now
                    self._slots[number] = self._file(name, Position(records, offset))

    def close(self) -> None:
        """See `Stage`."""
        for file in self._slots:
            if file is not None:
                add_losses(self._losses, file.reader.losses)
                file.reader.close()
        self._slots = [None] * len(self._slots)
        self._more = False
        self._files.close()


def take_in_turns(cursors: Sequence[Cursor], block: int) -> Records:
    """Rounds of `block` records of each cursor: as many as the chunks at hand allow, or one.

    Args:
        cursors: At least one; each has a record at hand.
        block: Records of one before it is the next one's turn; less only at its end.
    """
    rounds = min(each.left for each in cursors) // block
    if rounds and len(cursors) == 1:
        return cursors[0].take(rounds * block)
    if rounds:
        place = np.arange(len(cursors) * rounds * block).reshape(len(cursors), rounds, block)
        parts = [each.take(rounds * block) for each in cursors]
        return Records.concatenate(parts).take(place.transpose(1, 0, 2).ravel())
    parts = []
    for each in cursors:
        wanted = block
        while wanted and each.fill():
            parts.append(each.take(min(wanted, each.left)))
            wanted -= len(parts[-1])
    return Records.concatenate(parts)


class Streaming:
    """Chunks of a reader that knows its own position.

    Args:
        opener: Opens it at a position, or where it begins.
        losses: Where what was skipped is added up.
    """

    def __init__(self, opener: Callable[[Position | None], RecordReader], losses: Losses) -> None:
        self._open = opener
        self._losses = losses
        self._start: Position | None = None
        self._reader: RecordReader | None = None

    def __next__(self) -> Records:
        if self._reader is None:
            self._reader = self._open(self._start)
        return next(self._reader)

    def state(self) -> State:
        """See `Stage`."""
        at = self._start if self._reader is None else self._reader.position
        return {"at": None if at is None else (at.records, at.offset, at.partitions)}

    def restore(self, state: State) -> None:
        """See `Stage`."""
        at = state["at"]
        self._start = None if at is None else Position(at[0], at[1], at[2])

    def close(self) -> None:
        """See `Stage`."""
        if self._reader is not None:
            add_losses(self._losses, self._reader.losses)
            self._reader.close()
            self._reader, self._open = None, _nothing


def _nothing(start: Position | None) -> RecordReader:
    raise StopIteration


def add_losses(total: Losses, more: Losses) -> None:
    """Add what one reader skipped to what all did."""
    total.records += more.records
    total.bytes += more.bytes
    total.messages += more.messages[: 10 - len(total.messages)]


class Memory:
    """Records that are there already."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._at = 0

    def __next__(self) -> Records:
        if self._at == len(self._records):
            raise StopIteration
        rest = self._records.take(slice(self._at, self._at + 1024))
        self._at += len(rest)
        return rest

    def state(self) -> State:
        """See `Stage`."""
        return {"at": self._at}

    def restore(self, state: State) -> None:
        """See `Stage`."""
        self._at = state["at"]

    def close(self) -> None:
        """See `Stage`."""
        self._at = len(self._records)


class _Input(Cursor):
    """One input of a merge."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def pull(self) -> Records | None:
        return next(self.stage, None)


class Merging:
    """The records of several stages, `block` of each in turn, until all have ended."""

    def __init__(self, stages: Sequence[Stage], block: int = 1) -> None:
        self._inputs = [_Input(stage) for stage in stages]
        self._block = block

    def __next__(self) -> Records:
        open_ = [each for each in self._inputs if each.fill()]
        if not open_:
            raise StopIteration
        return take_in_turns(open_, self._block)

    def state(self) -> State:
        """See `Stage`."""
        return {
            "inputs": tuple(
                {
                    "rest": each.chunk.take(slice(each.at, None)) if each.chunk is not None and each.left else None,
                    "stage": each.stage.state(),
                }
                for each in self._inputs
            )
        }

    def restore(self, state: State) -> None:
        """See `Stage`."""
        for each, saved in zip(self._inputs, state["inputs"], strict=True):
            each.chunk, each.at = saved["rest"], 0
            each.stage.restore(saved["stage"])

    def close(self) -> None:
        """See `Stage`."""
        for each in self._inputs:
            each.stage.close()
