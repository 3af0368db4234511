"""Click data as files of Examples: written once, then read like anybody's logs, by a pipeline of `trilith.data`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trilith.data.formats.writers import open_writer
from trilith.data.parse.parsers import ParseSpec
from trilith.data.parse.specs import Features, Label, Sparse
from trilith.data.pipeline.dataset import Dataset, read
from trilith.data.records import Kind, Records
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged
from trilith_proto.example_pb2 import Example
from trilith_services.demo.clicks import ClickData

__all__ = ["ClickFiles", "click_records", "store_clicks"]

_FILES = 12  # of which 2, 3, 4 or 6 workers have equal shares
_ABOUT = "about.json"


def click_records(data: ClickData) -> Records:
    """Samples as Examples: the ids of a feature are its fids, and the label is the label."""
    columns = [(name, ragged.values.tolist(), ragged.row_splits.tolist()) for name, ragged in data.features.items()]
    payloads = []
    for row, label in enumerate(data.labels.tolist()):
        example = Example(label=[label])
        for name, values, splits in columns:
            fids = example.named_feature.add(name=name).feature.fid_v2_list
            fids.value.extend(values[splits[row] : splits[row + 1]])
        payloads.append(example.SerializeToString())
    return Records.of(payloads, Kind.EXAMPLE)


def store_clicks(data: ClickData, directory: Path) -> ClickFiles:
    """Write samples below `directory`, unless these very samples are there already.

    Several processes may do so at once: a folder of files appears under its name when it is complete.
    """
    mark = zlib.crc32(data.labels.tobytes())
    for name, ragged in sorted(data.features.items()):
        mark = zlib.crc32(
            ragged.row_splits.tobytes(), zlib.crc32(ragged.values.tobytes(), zlib.crc32(name.encode(), mark))
        )
    folder = directory / f"clicks-{len(data)}-{mark:08x}"
    if not (folder / _ABOUT).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=directory, prefix="writing-"))
        try:
            _write(data, scratch)
            with suppress(OSError):  # another process was faster
                os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    about = json.loads((folder / _ABOUT).read_text())
    return ClickFiles(str(folder / "part-*.pb"), tuple(about["features"]), about["samples"])


def _write(data: ClickData, folder: Path) -> None:
    bounds = np.linspace(0, len(data), _FILES + 1).astype(int).tolist()
    for number in range(_FILES):
        with open_writer(str(folder / f"part-{number:05d}.pb")) as out:
            out.write(click_records(data.take(np.arange(bounds[number], bounds[number + 1]))))
    (folder / _ABOUT).write_text(json.dumps({"features": list(data.features), "samples": len(data)}))


@dataclass(frozen=True, slots=True)
class ClickFiles:
    """Samples in files, or a share of them.

    Attributes:
        pattern: The files.
        features: Names of the features.
        samples: Samples of the files.
        index: Which share, by sample.
        count: Of how many.
    """

    pattern: str
    features: tuple[str, ...]
    samples: int
    index: int = 0
    count: int = 1

    def __len__(self) -> int:
        return len(range(self.index, self.samples, self.count))

    def shard(self, index: int, count: int) -> ClickFiles:
        """Every `count`-th sample, from `index` on."""
        if not 0 <= index < count or self.count != 1:
            raise InvalidRequestError(f"shard {index} of {count}: the index must be in 0..{count - 1}, of whole files")
        return replace(self, index=index, count=count)

    def dataset(self) -> Dataset:
        """The samples, unbatched, with a parser that makes `ClickData` of a batch."""
        spec = ParseSpec({"label": Label(), **{name: Sparse() for name in self.features}})
        records = read(self.pattern, kind=Kind.EXAMPLE).shard(self.index, self.count, by="records")
        return records.parse(spec).map(self._clicks)

    def _clicks(self, parsed: Features) -> ClickData:
        features = {
            name: Ragged(parsed[name].values.view(np.uint64), parsed[name].row_splits) for name in self.features
        }
        return ClickData(np.ascontiguousarray(parsed["label"][:, 0]), features)

    def epoch(
        self, batch_size: int, *, seed: int, epoch: int, samples: int | None = None, skip: int = 0
    ) -> Iterator[ClickData]:
        """Batches of one pass, in an order that seed, epoch and share decide.

        Args:
            batch_size: Samples per batch; the last may be smaller.
            seed: Decides the order ...
            epoch: ... with the pass.
            samples: How many samples; all if None.
            skip: Batches to leave out at the beginning.
        """
        dataset = self.dataset().shuffle(max(len(self), 1), seed=seed * 65_537 + self.index)
        if samples is not None:
            dataset = dataset.take(samples)
        with dataset.skip(skip * batch_size).batch(batch_size).prefetch(2).iterate(epoch=epoch) as batches:
            yield from batches
