"""Click data as files of Examples: written once, then read like anybody's logs, by a pipeline of `trilith.data`."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from trilith.data.formats.writers import open_writer
from trilith.data.records import Kind, Records
from trilith_proto.example_pb2 import Example
from trilith_services.demo.clicks import ClickData

__all__ = ["click_records", "store_clicks"]

_FILES = 12  # of which 2, 3, 4 or 6 workers have equal shares


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


def store_clicks(data: ClickData, directory: Path) -> str:
    """Write samples below `directory`, unless these very samples are there already; returns the pattern of the files.

    Several processes may do so at once: a folder of files appears under its name when it is complete.
    """
    mark = zlib.crc32(data.labels.tobytes())
    for name, ragged in sorted(data.features.items()):
        mark = zlib.crc32(
            ragged.row_splits.tobytes(), zlib.crc32(ragged.values.tobytes(), zlib.crc32(name.encode(), mark))
        )
    folder = directory / f"clicks-{len(data)}-{mark:08x}"
    if not folder.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=directory, prefix="writing-"))
        try:
            _write(data, scratch)
            with suppress(OSError):  # another process was faster
                os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return str(folder / "part-*.pb")


def _write(data: ClickData, folder: Path) -> None:
    bounds = np.linspace(0, len(data), _FILES + 1).astype(int).tolist()
    for number in range(_FILES):
        with open_writer(str(folder / f"part-{number:05d}.pb")) as out:
            out.write(click_records(data.take(np.arange(bounds[number], bounds[number + 1]))))
