"""Strings that hold samples, from queues and services, as records: with or without a frame, with their data source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from trilith.data.fids import data_source_key
from trilith.data.formats.framing import Framing, Scratch, explain, split_frames
from trilith.data.records import Kind, Records
from trilith.errors import DataError, InvalidRequestError
from trilith_proto import example_pb2, line_id_pb2, proto_parser_pb2

__all__ = ["string_to_variant"]

_LINE_ID = "__LINE_ID__"


def string_to_variant(
    strings: Sequence[bytes],
    kind: Kind | str,
    *,
    has_header: bool = False,
    framing: Framing | None = None,
    chnids: Sequence[int] | None = None,
    datasources: Sequence[str] | None = None,
    default_datasource: str = "",
    source: str = "(memory)",
) -> tuple[Records, npt.NDArray[np.bool_]]:
    """One record per string.

    Args:
        strings: Payloads, or one framed record each.
        kind: What the payloads are.
        has_header: Whether the strings are framed.
        framing: How.
        chnids: Channels (line_id.chnid) whose data source is known.
        datasources: Their data sources, as many.
        default_datasource: Of samples from other channels.
        source: Name for messages.

    Returns:
        The records, an empty one for an empty payload. Their source keys are the frame's with a lagrangex header, else
        that of the channel's data source, else the default's; of an ExampleBatch without such a header, 0.
        And bool[n]: whether the record is not empty.

    Raises:
        DataError: A string does not begin with a whole record, or a payload whose channel is needed cannot be parsed.
    """
    framing = framing or Framing()
    kind = Kind(kind)
    if len(chnids or ()) != len(datasources or ()):
        raise InvalidRequestError(
            f"chnids has {len(chnids or ())} members and datasources {len(datasources or ())}: give one for each"
        )
    records = _framed(strings, kind, framing, source) if has_header else Records.of(strings, kind, source=source)
    if not (has_header and framing.lagrangex_header) and kind is not Kind.EXAMPLE_BATCH:
        known = dict(zip(chnids or (), map(data_source_key, datasources or ()), strict=True))
        default = data_source_key(default_datasource)
        keys = [known.get(_chnid(records, index), default) for index in range(len(records))] if known else default
        records.source_keys[:] = keys
    return records, records.lengths > 0


def _framed(strings: Sequence[bytes], kind: Kind, framing: Framing, source: str) -> Records:
    whole = Records.of(strings, kind, source=source)
    scratch = Scratch(1)
    offsets, lengths = np.empty(len(whole), np.int64), np.empty(len(whole), np.int64)
    keys = np.zeros(len(whole), np.uint32)
    for index, (offset, length) in enumerate(zip(whole.offsets.tolist(), whole.lengths.tolist(), strict=True)):
        split_frames(whole.buffer, offset, offset + length, framing, scratch)
        if not scratch.found:
            raise DataError(f"{whole.where(index)}: {explain(scratch.status, length, scratch.need)}")
        offsets[index] = offset + scratch.offsets[0]
        lengths[index] = scratch.lengths[0]
        keys[index] = scratch.keys[0] if framing.lagrangex_header else 0
    return replace(whole, offsets=offsets, lengths=lengths, source_keys=keys)


def _chnid(records: Records, index: int) -> int:
    payload = records.payload(index)
    try:
        if records.kind is Kind.INSTANCE:
            return proto_parser_pb2.Instance.FromString(payload).line_id.chnid
        if records.kind is Kind.EXAMPLE:
            example = example_pb2.Example.FromString(payload)
            named = (each.feature.bytes_list.value for each in example.named_feature if each.name == _LINE_ID)
            reserved = next((values[0] for values in named if values), None)
            line_id = example.line_id if reserved is None else line_id_pb2.LineId.FromString(reserved)
            return line_id.chnid
    except DecodeError as error:
        raise DataError(f"{records.where(index)}: cannot be parsed as {records.kind}: {error}") from None
    return 0
