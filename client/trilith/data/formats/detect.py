"""What a file of records seems to be: its format, compression, framing and kind, from its first bytes."""

from __future__ import annotations

import io
import itertools
import struct
from dataclasses import dataclass, field, replace

import numpy as np
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from trilith.data.formats import framing_kernels as kernels
from trilith.data.formats.compression import MARKS, Compression, compression_of, decompressing
from trilith.data.formats.framing import Framing, Scratch, split_all, split_frames
from trilith.data.formats.readers import FileFormat, marked_format, named_format
from trilith.data.formats.streams import ByteStream, FileStream, open_file
from trilith.data.formats.tfrecord import concatenate, frame_records, read_records
from trilith.data.messages import is_tf_example
from trilith.data.records import Kind, Records
from trilith.errors import DataError
from trilith_proto import example_pb2, proto_parser_pb2

__all__ = ["Detected", "detect"]

_LOOK = 1 << 20
_PARSED = 20
_CLASSES: dict[Kind, type[Message]] = {
    Kind.INSTANCE: proto_parser_pb2.Instance,
    Kind.EXAMPLE: example_pb2.Example,
    Kind.EXAMPLE_BATCH: example_pb2.ExampleBatch,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """What reads a file.

    Attributes:
        format: How records are stored.
        compression: Of the stream.
        framing: What stands in front of payloads of format "records".
        kind: What the payloads are; plaintext if they are no samples.
        tf_examples: Whether they are tf.Examples.
    """

    format: FileFormat
    compression: Compression = Compression.NONE
    framing: Framing = field(default_factory=Framing)
    kind: Kind = Kind.PLAINTEXT
    tf_examples: bool = False


def detect(path: str) -> Detected:
    """Guess how a file is to be read; a guess, as frames carry no mark.

    Raises:
        DataError: Nothing fits.
    """
    with open_file(path) as file:
        head = file.read(8)
    if not head:
        raise DataError(f"{path} is empty: there is no record to guess from")
    if (marked := marked_format(head)) is not None:
        return Detected(format=marked, kind=Kind.EXAMPLE)
    if named_format(path) is FileFormat.CSV:
        return Detected(format=FileFormat.CSV, compression=compression_of(path, FileFormat.CSV), kind=Kind.EXAMPLE)
    named = next((each for magic, each in MARKS.items() if head.startswith(magic)), None)
    for compression in (Compression.NONE, Compression.SNAPPY) if named is None else (named, Compression.NONE):
        data, whole = _beginning(path, compression)
        found = _detect_bytes(data, whole) if data else None
        if found is not None:
            return replace(found, compression=compression)
    raise DataError(f"{path}: record 0, byte 0: no known format, compression or framing reads this file")


def _beginning(path: str, compression: Compression) -> tuple[bytes, bool]:
    """The first megabyte, uncompressed, and whether that is all."""
    raw = FileStream(open_file(path))
    stream: ByteStream = decompressing(raw, compression)
    target = memoryview(bytearray(_LOOK))
    filled = 0
    try:
        while filled < _LOOK and (got := stream.readinto(target[filled:])):
            filled += got
    except DataError:  # another compression, or cut off: then what came before says enough
        return bytes(target[:filled]), False
    finally:
        stream.close()
    return bytes(target[:filled]), filled < _LOOK


def _detect_bytes(data: bytes, whole: bool) -> Detected | None:
    if len(data) >= kernels.FRAME_BYTES and _is_tfrecord(data):
        records = _first_tfrecords(data)
        kind = _kind(records)[0]
        looked_at = [records.payload(index) for index in range(min(_PARSED, len(records)))]
        if looked_at and all(map(is_tf_example, looked_at)):
            return Detected(format=FileFormat.TFRECORD, tf_examples=True)
        return Detected(format=FileFormat.TFRECORD, kind=kind)
    best: tuple[tuple[int, ...], Detected] | None = None
    flags = [
        Framing(kafka_dump_prefix=prefix, has_sort_id=sort_id, kafka_dump=dump)
        for prefix, sort_id, dump in itertools.product((False, True), repeat=3)
    ]
    flags.append(Framing(lagrangex_header=True))
    for framing in flags:
        records, complete = _records(data, whole, framing)
        if not records.payload_bytes:
            continue
        kind, parsed = _kind(records)
        # Empty records are what zeros in a header look like under the wrong flags, and a lagrangex header without any
        # key is as good as a dump's.
        keyed = 2 * int(records.source_keys.any()) - int(framing.lagrangex_header)
        score = (parsed, int(complete), -int((records.lengths == 0).sum()), keyed, records.payload_bytes)
        if best is None or score > best[0]:
            best = score, Detected(format=FileFormat.RECORDS, framing=framing, kind=kind)
    return None if best is None else best[1]


def _is_tfrecord(data: bytes) -> bool:
    """Whether the first eight bytes are a length with its checksum."""
    size = min(struct.unpack_from("<Q", data)[0], len(data))
    framed = frame_records(*concatenate([bytes(size)])).tobytes()
    return framed[:12] == data[:12]


def _first_tfrecords(data: bytes) -> Records:
    payloads: list[bytes] = []
    try:
        for batch in read_records(io.BytesIO(data), name=""):
            payloads += batch.payloads()
    except DataError:  # where the data was cut, or worse
        pass
    return Records.of(payloads, Kind.PLAINTEXT)


def _records(data: bytes, whole: bool, framing: Framing) -> tuple[Records, bool]:
    """The records of the data under a framing, and whether nothing contradicts it."""
    scratch = Scratch(len(data) // 8 + 1)
    split_frames(np.frombuffer(data, np.uint8), 0, len(data), framing, scratch)
    complete = scratch.status == kernels.WHOLE and not (whole and scratch.used < len(data))
    return split_all(data[: scratch.used], framing, Kind.PLAINTEXT), complete


def _kind(records: Records) -> tuple[Kind, int]:
    """The kind that the first payloads parse as, most of them without unknown fields, and how many those are."""
    best, most = Kind.PLAINTEXT, 0
    full = records.take(records.lengths > 0)
    looked_at = [full.payload(index) for index in range(min(_PARSED, len(full)))]
    for kind, cls in _CLASSES.items():
        known = _known(cls, looked_at)
        if known > max(most, len(looked_at) // 2):
            best, most = kind, known
    return best, most


def _known(cls: type[Message], payloads: list[bytes]) -> int:
    """How many payloads have known fields only; 0 if one cannot be parsed."""
    known = 0
    for payload in payloads:
        try:
            message = cls.FromString(payload)
        except DecodeError:
            return 0
        known += len(UnknownFieldSet(message)) == 0 and len(message.ListFields()) > 0
    return known
