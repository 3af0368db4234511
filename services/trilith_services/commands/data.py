"""`trilith data`: inspect, count, sample, convert and validate files of training samples."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trilith_services.commands import output
from trilith_services.commands.data_flags import (
    ColumnsOption,
    CompressionOption,
    CsvOption,
    File,
    Files,
    FormatOption,
    FramingOption,
    KindOption,
    SkipOption,
    known_compression,
    known_kind,
    known_output_format,
)
from trilith_services.commands.flags import Json

if TYPE_CHECKING:
    from trilith.data.formats.detect import Detected
    from trilith.data.formats.framing import Framing
    from trilith.data.formats.reading import RecordReader
    from trilith.data.records import Records

__all__ = ["register"]

_FLAGS = {
    "lagrangex": "lagrangex_header",
    "prefix": "kafka_dump_prefix",
    "sort_id": "has_sort_id",
    "dump": "kafka_dump",
}

_CSV_NAMES = ("delimiter", "header", "list_separator", "encoding")


def register(app: typer.Typer) -> None:
    """Add the `data` commands."""
    group = typer.Typer(no_args_is_help=True, help="Look at training data: inspect, count, sample, convert, validate.")
    for command in (inspect, count, sample, convert, validate):
        group.command()(command)
    app.add_typer(group, name="data")


@dataclass(frozen=True, slots=True)
class _Input:
    """How files are to be read; None stands for a guess."""

    format: str | None
    kind: str | None
    framing: str | None
    compression: str | None
    columns: str | None = None
    csv: list[str] | None = None
    skip: bool = False

    def open(self, path: str) -> RecordReader:
        from trilith.data.formats.readers import open_records

        guess = self._guess(path)
        file_format = self._said or guess.format
        kind = self.kind or (guess.kind if file_format in (guess.format, "parquet", "csv") else "instance")
        framing = guess.framing if self.framing is None else _framing(self.framing)
        return open_records(
            path,
            format=file_format,
            kind=kind,
            framing=framing if file_format == "records" else None,
            compression=self.compression or guess.compression,
            columns=_columns(self.columns),
            **_csv_form(self.csv),
            on_error="skip" if self.skip else "raise",
        )

    @property
    def _said(self) -> str | None:
        """The format, where it was said."""
        return self.format or ("csv" if self.csv else None)

    def _guess(self, path: str) -> Detected:
        """What was left out, guessed where there is a beginning to look at; a note says so."""
        from trilith.data.formats.compression import compression_of
        from trilith.data.formats.detect import Detected, detect
        from trilith.data.formats.readers import FileFormat
        from trilith.data.records import Kind
        from trilith.errors import DataError

        file_format = FileFormat(self._said or "records")
        columnar = file_format in (FileFormat.PARQUET, FileFormat.CSV)
        plain = Detected(
            format=file_format,
            compression=compression_of(path, file_format, compression=self.compression),
            kind=Kind.EXAMPLE if columnar else Kind.INSTANCE,
        )
        asked = [self._said, self.kind, "" if file_format is not FileFormat.RECORDS else self.framing]
        if path == "" or columnar or None not in asked:
            return plain
        try:
            guess = detect(path)
        except DataError:
            return plain  # its reader will say what is wrong
        names = _names(guess.framing) if guess.format is FileFormat.RECORDS and self.framing is None else None
        said = [f"format {guess.format}"] * (self.format is None) + [f"kind {guess.kind}"] * (self.kind is None)
        said += [f"framing {names}"] * (names is not None)
        typer.echo(f"{path}: guessed {', '.join(said)}", err=True)
        return guess


def inspect(path: File, csv: CsvOption = None, as_json: Json = False) -> None:
    """Guess how a file is to be read, and show what its first records hold."""
    from trilith.data.formats.compression import Compression, compression_of
    from trilith.data.formats.detect import Detected, detect
    from trilith.data.formats.readers import FileFormat
    from trilith.data.records import Kind

    if csv:
        packed = compression_of(path, FileFormat.CSV)
        guess = Detected(format=FileFormat.CSV, compression=packed, kind=Kind.EXAMPLE)
    else:
        guess = detect(path)
    flags = _names(guess.framing)
    opened = _Input(guess.format, guess.kind, flags, guess.compression, csv=csv)
    with opened.open(path) as reader:
        chunk = next(reader, None)
        names = _column_names(reader)
    found: dict[str, Any] = {
        "file": path,
        "format": guess.format,
        "compression": guess.compression,
        "framing": flags,
        "kind": guess.kind,
        "looked_at": 0 if chunk is None else len(chunk),
        "tf_examples": guess.tf_examples,
    }
    features: Counter[tuple[str, str]] = Counter()
    if chunk is not None and len(chunk):
        sizes = sorted(chunk.lengths.tolist())
        found |= {"bytes_min": sizes[0], "bytes_median": sizes[len(sizes) // 2], "bytes_max": sizes[-1]}
        if guess.kind is not Kind.PLAINTEXT:
            head = chunk.take(slice(0, 100))
            features.update(each for _, message in _messages(head) for each in set(_features(message)))
            found["parsed"] = len(head)
    listed: list[dict[str, Any]] = [
        {"feature": name, "type": kind, "records": number} for (name, kind), number in sorted(features.items())
    ]
    if as_json:
        typer.echo(json.dumps({**found, "features": listed}))
        return
    console = output.console()
    packed_as = "no" if guess.compression is Compression.NONE else guess.compression
    console.print(f"[bold]{path}[/]: {guess.format}, {packed_as} compression, kind {guess.kind} (a guess)")
    if guess.format is FileFormat.RECORDS:
        console.print(f"framing: {flags}")
    if guess.tf_examples:
        from trilith.data.messages import HINT

        console.print(HINT)
    if names:
        console.print(f"columns: {', '.join(names)}", markup=False)
    if chunk is None or not len(chunk):
        console.print("no records")
    else:
        console.print(
            f"first {output.count(len(chunk))} records: {found['bytes_min']} to {found['bytes_max']} bytes, "
            f"median {found['bytes_median']}"
        )
    if listed:
        grid = output.grid("feature", "type", f">in {found['parsed']} records")
        for each in listed:
            grid.add_row(each["feature"], each["type"], str(each["records"]))
        console.print()
        console.print(grid)


def count(
    files: Files,
    format_: FormatOption = None,
    kind: KindOption = None,
    framing: FramingOption = None,
    compression: CompressionOption = None,
    columns: ColumnsOption = None,
    csv: CsvOption = None,
    skip_damage: SkipOption = False,
    as_json: Json = False,
) -> None:
    """Count the records of files and the bytes of their payloads."""
    opened = _Input(format_, kind, framing, compression, columns, csv, skip_damage)
    found: list[dict[str, Any]] = []
    for path, reader in _readers(files, opened, "counting"):
        records = size = 0
        for chunk in reader:
            records += len(chunk)
            size += chunk.payload_bytes
        found.append({"file": path, "records": records, "payload_bytes": size, "skipped": reader.losses.records})
    if as_json:
        for each in found:
            typer.echo(json.dumps(each))
        return
    grid = output.grid("file", ">records", ">payload", ">skipped")
    total = {"file": "total"} | {
        key: sum(each[key] for each in found) for key in ("records", "payload_bytes", "skipped")
    }
    for each in [*found, total] if len(found) > 1 else found:
        amounts = output.count(each["records"]), output.size(each["payload_bytes"]), output.count(each["skipped"])
        grid.add_row(each["file"] or "(standard input)", *amounts)
    output.console().print(grid)


def sample(
    files: Files,
    number: Annotated[int, typer.Option("--number", "-n", metavar="N", min=1, help="How many records.")] = 5,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw from all records, each equally likely; left out: the first ones."),
    ] = None,
    format_: FormatOption = None,
    kind: KindOption = None,
    framing: FramingOption = None,
    compression: CompressionOption = None,
    columns: ColumnsOption = None,
    csv: CsvOption = None,
    skip_damage: SkipOption = False,
) -> None:
    """Print some records as JSON lines: where they stand, and their message (plaintext: their bytes in hex)."""
    import random

    opened = _Input(format_, kind, framing, compression, columns, csv, skip_damage)
    draw = None if seed is None else random.Random(seed)
    kept: list[Records] = []
    seen = 0
    for _, reader in _readers(files, opened, "sampling"):
        for chunk in reader:
            if draw is None:
                kept.append(chunk.take(slice(0, number - len(kept))).compact())
                seen += len(kept[-1])
                if seen >= number:
                    break
                continue
            for index in range(len(chunk)):
                seen += 1
                place = len(kept) if len(kept) < number else draw.randrange(seen)
                if place < number:
                    kept[place : place + 1] = [chunk.take([index]).compact()]
        if draw is None and seen >= number:
            break
    for chunk in kept:
        for index, message in _messages(chunk):
            typer.echo(json.dumps({"record": chunk.where(index), "message": message}))


def convert(
    files: Files,
    target: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Where to; - for standard output.")],
    format_: FormatOption = None,
    kind: KindOption = None,
    framing: FramingOption = None,
    compression: CompressionOption = None,
    columns: ColumnsOption = None,
    csv: CsvOption = None,
    to_format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            callback=known_output_format,
            help="records, tfrecord or parquet (of examples); left out: what the output's name ends in, or records.",
        ),
    ] = None,
    to_kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", callback=known_kind, help="instance, example or plaintext; left out: what they are."
        ),
    ] = None,
    to_framing: Annotated[str, typer.Option(metavar="PART,…", help="As --framing.")] = "none",
    to_compression: Annotated[
        str | None, typer.Option(metavar="NAME", callback=known_compression, help="As --compression.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most records to take.")] = None,
    skip_damage: SkipOption = False,
) -> None:
    """Write the records of files into one file of another format, framing, compression or kind.

    The output is there once it is whole; where a conversion fails there is none.
    """
    from trilith.data.formats.writers import open_writer
    from trilith.data.messages import convert as convert_records

    opened = _Input(format_, kind, framing, compression, columns, csv, skip_damage)
    place = "" if target == "-" else target
    on_error: Literal["raise", "skip"] = "skip" if skip_damage else "raise"
    lost: list[int] = []
    taken = written = skipped = 0
    with open_writer(place, format=to_format, framing=_framing(to_framing), compression=to_compression) as writer:
        for _, reader in _readers(files, opened, "converting"):
            for chunk in reader:
                if limit is not None:
                    chunk = chunk.take(slice(0, limit - taken))
                taken += len(chunk)
                made = chunk
                if to_kind is not None:
                    made = convert_records(chunk, to_kind, on_error=on_error, lost=lost.append)
                written += len(made)
                if len(made):
                    writer.write(made)
                if limit is not None and taken >= limit:
                    break
            skipped += reader.losses.records
            if limit is not None and taken >= limit:
                break
    skipped += sum(lost)
    note = f" ({output.count(skipped)} damaged skipped)" if skipped else ""
    typer.echo(f"{output.count(taken)} records read{note}, {output.count(written)} written to {target}", err=not place)


def validate(
    files: Files,
    format_: FormatOption = None,
    kind: KindOption = None,
    framing: FramingOption = None,
    compression: CompressionOption = None,
    columns: ColumnsOption = None,
    csv: CsvOption = None,
    as_json: Json = False,
) -> None:
    """Read every record and parse it; name what is damaged. Exit status 1 if anything is."""
    from trilith.data.messages import HINT, is_tf_example, message_of
    from trilith.data.records import Kind
    from trilith.errors import DataError

    opened = _Input(format_, kind, framing, compression, columns, csv, skip=True)
    records = damaged = 0
    names = 0
    for path, reader in _readers(files, opened, "validating", quiet=True):
        names += 1
        good, problems = 0, []
        for chunk in reader:
            if reader.kind is Kind.PLAINTEXT:
                good += len(chunk)
                continue
            for index in range(len(chunk)):
                payload = chunk.payload(index)
                try:
                    message_of(payload, reader.kind)
                    if is_tf_example(payload):  # which may look like another message by chance
                        raise DataError(f"no {reader.kind}: {HINT}")
                except DataError as error:
                    problems.append(f"{chunk.where(index)}: {error}")
                else:
                    good += 1
        bad = len(problems) + reader.losses.records
        problems = [*reader.losses.messages, *problems]
        records, damaged = records + good, damaged + bad
        if as_json:
            typer.echo(json.dumps({"file": path, "good": good, "damaged": bad, "problems": problems[:20]}))
        else:
            for problem in problems[:20]:
                typer.echo(f"damaged: {problem}", err=True)
            if bad > 20:
                typer.echo(f"{path}: {output.count(bad - 20)} more", err=True)
    if not as_json:
        verdict = f"{output.count(damaged)} damaged" if damaged else "all good"
        named = "1 file" if names == 1 else f"{output.count(names)} files"
        typer.echo(f"{named}, {output.count(records)} records: {verdict}")
    if damaged:
        raise typer.Exit(1)


def _readers(
    patterns: Iterable[str], opened: _Input, what: str, *, quiet: bool = False
) -> Iterator[tuple[str, RecordReader]]:
    """A reader per file, with a progress bar of all files' stored bytes; what was skipped goes to stderr."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from trilith.data.formats.files import match_files

    log = logging.getLogger("trilith.data")
    if not log.handlers:  # what is skipped is told below
        log.addHandler(logging.NullHandler())
    names = [""] if list(patterns) == ["-"] else match_files(list(patterns))
    bar = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*bar, console=output.console(stderr=True), transient=True) as progress:
        for number, name in enumerate(names, 1):
            with opened.open(name) as reader:
                task = progress.add_task(f"{what} {number}/{len(names)}", total=reader.progress[1])
                yield name, _Watched(reader, lambda done, task=task: progress.update(task, completed=done))
                progress.remove_task(task)
                if reader.losses.records and not quiet:
                    for message in reader.losses.messages:
                        typer.echo(f"skipped: {message}", err=True)


class _Watched:
    """A reader that tells how far it is."""

    def __init__(self, reader: RecordReader, tell: Any) -> None:
        self._reader = reader
        self._tell = tell
        self.kind = reader.kind
        self.losses = reader.losses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def __iter__(self) -> Iterator[Records]:
        for chunk in self._reader:
            self._tell(self._reader.progress[0])
            yield chunk


def _framing(text: str) -> Framing:
    from trilith.data.formats.framing import Framing
    from trilith.errors import InvalidRequestError

    names = [name for name in text.replace(" ", "").split(",") if name not in ("", "none")]
    if unknown := sorted(set(names) - set(_FLAGS)):
        raise InvalidRequestError(f"framing {unknown[0]!r}: choose from {sorted(_FLAGS)}")
    return Framing(**{_FLAGS[name]: True for name in names})


def _names(framing: Framing) -> str:
    return ",".join(name for name, flag in _FLAGS.items() if getattr(framing, flag)) or "none"


def _column_names(reader: RecordReader) -> list[str]:
    """The columns of a file, of Parquet with what they are read as; empty where there are none."""
    from trilith.data.formats.parquet import ParquetReader

    if not isinstance(reader, ParquetReader):
        return list(reader.available or {})
    types = {each.name: str(each.type) for each in reader.columns}
    return [f"{name} ({types.get(name) or reason or 'no values'})" for name, reason in (reader.available or {}).items()]


def _csv_form(given: list[str] | None) -> dict[str, Any]:
    """Options of `open_records` about CSV files."""
    from trilith.errors import InvalidRequestError

    form: dict[str, Any] = {}
    for item in given or ():
        name, equals, value = item.partition("=")
        if not equals or name not in _CSV_NAMES:
            raise InvalidRequestError(f"--csv {item!r}: write NAME=VALUE with a name of {', '.join(_CSV_NAMES)}")
        form[name] = value.split(",") if name == "header" else {"\\t": "\t"}.get(value, value)
    return form


def _columns(text: str | None) -> list[Any] | None:
    if text is None:
        return None
    from trilith.data.scan.rows import Column
    from trilith.errors import InvalidRequestError

    found = []
    for item in text.split(","):
        name, colon, kind = item.strip().rpartition(":")
        if not colon:
            raise InvalidRequestError(f"column {item!r}: write name:type, such as user:fid_v2")
        found.append(Column(name, kind))
    return found


def _messages(records: Records) -> Iterator[tuple[int, Any]]:
    """Each record's message as plain values."""
    from google.protobuf.json_format import MessageToDict

    from trilith.data.messages import message_of
    from trilith.data.records import Kind
    from trilith.errors import DataError

    for index in range(len(records)):
        payload = records.payload(index)
        if records.kind is Kind.PLAINTEXT:
            yield index, payload.hex()
            continue
        try:
            message = message_of(payload, records.kind)
        except DataError as error:
            raise DataError(f"{records.where(index)}: {error}") from None
        yield index, MessageToDict(message, preserving_proto_field_name=True)


def _features(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and type of everything a message holds."""
    for name, value in message.items():
        if name in ("feature", "named_feature", "named_feature_list"):
            for each in value:
                inner = each.get("feature", each)
                inner = inner[0] if isinstance(inner, list) and inner else inner
                kinds = [key for key in inner if key not in ("name", "id", "type")] if isinstance(inner, dict) else []
                yield each.get("name", ""), ",".join(kinds) or "empty"
        elif name == "line_id":
            yield from ((f"line_id.{key}", "field") for key in value)
        else:
            yield name, "field"
