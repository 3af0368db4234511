"""The flags of `trilith data` that say how files are to be read."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated

import typer

from trilith.errors import InvalidRequestError
from trilith_services.commands.flags import checked

__all__ = [
    "ColumnsOption",
    "CompressionOption",
    "CsvOption",
    "File",
    "Files",
    "FormatOption",
    "FramingOption",
    "KindOption",
    "SkipOption",
    "known_compression",
    "known_format",
    "known_kind",
    "known_output_format",
]


def _among(module: str, name: str, *, but: str = "") -> Callable[[typer.CallbackParam, str | None], str | None]:
    """A callback that refuses what is no value of an enum, or `but`; the module is imported when the command runs."""

    def check(value: str) -> None:
        known = [str(each.value) for each in getattr(importlib.import_module(module), name) if each.value != but]
        if value not in known:
            raise InvalidRequestError(f"{value!r} is none of {', '.join(known)}")

    return checked(check)


known_format = _among("trilith.data.formats.readers", "FileFormat")
known_output_format = _among("trilith.data.formats.readers", "FileFormat", but="csv")
known_kind = _among("trilith.data.records", "Kind")
known_compression = _among("trilith.data.formats.compression", "Compression")

Files = Annotated[
    list[str], typer.Argument(help="Paths, globs or URLs that fsspec knows; - for standard input.", metavar="FILE")
]
File = Annotated[str, typer.Argument(help="A path, or a URL that fsspec knows.", metavar="FILE")]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        callback=known_format,
        help="records, tfrecord, parquet or csv; left out: a guess.",
    ),
]
KindOption = Annotated[
    str | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        callback=known_kind,
        help="instance, example, examplebatch or plaintext; left out: a guess.",
    ),
]
FramingOption = Annotated[
    str | None,
    typer.Option(
        "--framing",
        metavar="PART,…",
        help="What stands in front of payloads: none (but the length), lagrangex, or any of prefix,sort_id,dump; left "
        "out: a guess.",
    ),
]
CompressionOption = Annotated[
    str | None,
    typer.Option(
        "--compression",
        metavar="NAME",
        callback=known_compression,
        help="none, snappy, zstd, zlib or gzip; left out: what the file's name or beginning says.",
    ),
]
ColumnsOption = Annotated[
    str | None,
    typer.Option("--columns", metavar="NAME:TYPE,…", help="Columns of Parquet and CSV to read; left out: all of them."),
]
CsvOption = Annotated[
    list[str] | None,
    typer.Option(
        "--csv",
        metavar="NAME=VALUE",
        help="How CSV files are written: delimiter, header (names of the columns, by commas, of files without a first "
        "line of them), list_separator, encoding; may be repeated.",
    ),
]
SkipOption = Annotated[bool, typer.Option("--skip-damage", help="Pass over damage and count it, rather than stop.")]
