"""Where the tables and filters of a model checkpoint stand, in the reference system's layout.

Beside `<prefix>-<step>` is the directory `<prefix>-<step>.assets` with the files of tables and filters, and the text
file `ckpt.info-<step>` with row counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf import text_format

from trilith.errors import CheckpointError, InvalidRequestError
from trilith.folder import Folder
from trilith_proto import ckpt_info_pb2

__all__ = [
    "asset_base",
    "asset_directory",
    "filter_base",
    "find_restore_base",
    "multi_table_base",
    "only_asset_directory",
    "read_ckpt_info",
    "write_ckpt_info",
]

_SUFFIX = ".assets"


def asset_directory(prefix: str, step: int) -> str:
    """The directory of tables and filters, with a slash at its end."""
    return f"{prefix}-{step}{_SUFFIX}/"


def asset_base(directory: str, table_name: str) -> str:
    """What the names of a single table's files begin with."""
    return _join(directory, _file_name(table_name))


def multi_table_base(directory: str, suffix: str) -> str:
    """What the names of a multi-table's files begin with."""
    return _join(directory, f"MonolithMultiHashTable_{suffix}")


def filter_base(directory: str, index: int) -> str:
    """What the names of filter `index`'s files begin with."""
    return _join(directory, f"hash_filter_{index}")


def find_restore_base(directory: str, names: Sequence[str]) -> str:
    """What the files of a table begin with, which may have been saved under another of its names.

    Args:
        directory: The asset directory.
        names: The table's own name, then the extra ones, in the order to try.

    Raises:
        InvalidRequestError: There are files of none of them.
    """
    present = Folder(directory.rstrip("/")).names()
    for name in names:
        stem = _file_name(name)
        if any(file.startswith((f"{stem}-", f"{stem}.meta-")) for file in present):
            return _join(directory, stem)
    raise InvalidRequestError(f"{directory} has files of none of {', '.join(map(repr, names))}")


def only_asset_directory(directory: str) -> str | None:
    """The one asset directory in a model's directory, None if there is none or there are several."""
    found = [name for name in Folder(directory).names() if name.endswith(_SUFFIX)]
    return _join(directory, found[0]) + "/" if len(found) == 1 else None


def write_ckpt_info(directory: str, step: int, feature_counts: Mapping[str, int]) -> None:
    """Write the row counts of a checkpoint beside it."""
    info = ckpt_info_pb2.CkptInfo(feature_counts=dict(feature_counts))
    Folder(directory).write(f"ckpt.info-{step}", text_format.MessageToString(info).encode())


def read_ckpt_info(directory: str, step: int) -> ckpt_info_pb2.CkptInfo:
    """Read what `write_ckpt_info` wrote; CheckpointError if it is missing or no such text."""
    folder, name = Folder(directory), f"ckpt.info-{step}"
    try:
        return text_format.Parse(folder.read(name), ckpt_info_pb2.CkptInfo())
    except FileNotFoundError:
        raise CheckpointError(f"{folder.path(name)} is missing") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder.path(name)}: {error}") from None


def _file_name(table_name: str) -> str:
    return table_name.replace(":", "-").replace("/", "-")


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"
