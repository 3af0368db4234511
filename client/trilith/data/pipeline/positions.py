"""Positions of iterators as plain values that any format can keep."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from trilith.data.records import PADDING, Kind, Records
from trilith.data.samples.item_pool import PoolSnapshot
from trilith.data.scan.rows import Rows
from trilith.errors import InvalidRequestError

__all__ = ["from_json", "pack_state", "to_json", "unpack_state"]

_RECORDS, _ARROW, _BYTES, _TUPLE = "$records", "$arrow", "$bytes", "$tuple"
_ITEMS, _ARRAY, _TENSOR = "$items", "$array", "$tensor"
_ARRAYS = ("lengths", "source_keys", "numbers", "positions", "source_index")


def pack_state(state: Any) -> Any:
    """Copy a state into None, numbers, strings, bytes, lists and dicts; arrays and tensors are kept, too."""
    if isinstance(state, Rows) and hasattr(state, "packed"):
        return {_ARROW: state.packed()}
    if isinstance(state, Records):
        whole = state.compact()
        size = whole.payload_bytes
        return {
            _RECORDS: {
                "kind": str(whole.kind),
                "payloads": whole.buffer[:size].tobytes(),
                "sources": list(whole.sources),
                **{name: getattr(whole, name).tobytes() for name in _ARRAYS},
            }
        }
    if isinstance(state, PoolSnapshot):
        return state.export()
    if isinstance(state, tuple):
        return {_TUPLE: [pack_state(each) for each in state]}
    if isinstance(state, list):
        return [pack_state(each) for each in state]
    if isinstance(state, Mapping):
        if not all(isinstance(name, str) for name in state):
            return {_ITEMS: [[pack_state(name), pack_state(each)] for name, each in state.items()]}
        return {name: pack_state(each) for name, each in state.items()}
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, np.ndarray) and state.dtype.kind in "biuf":
        return {_ARRAY: [state.dtype.str, list(state.shape), np.ascontiguousarray(state).tobytes()]}
    if type(state).__module__ == "torch" and hasattr(state, "numpy"):  # of a loader of torch's; torch may not be here
        return {_TENSOR: pack_state(state.detach().cpu().numpy())}
    if state is None or isinstance(state, bool | int | float | str | bytes):
        return state
    raise InvalidRequestError(f"{type(state).__name__} cannot be part of a saved position")


def unpack_state(packed: Any) -> Any:
    """What `pack_state` was given."""
    if isinstance(packed, list):
        return [unpack_state(each) for each in packed]
    if not isinstance(packed, Mapping):
        return packed
    if _ITEMS in packed:
        return {unpack_state(name): unpack_state(each) for name, each in packed[_ITEMS]}
    if _ARRAY in packed:
        dtype, shape, content = packed[_ARRAY]
        return np.frombuffer(content, dtype).reshape(shape).copy()
    if _TENSOR in packed:
        import torch

        return torch.from_numpy(unpack_state(packed[_TENSOR]))
    if _TUPLE in packed:
        return tuple(unpack_state(each) for each in packed[_TUPLE])
    if _ARROW in packed:
        from trilith.data.formats.arrow_rows import ArrowRows  # late: it takes pyarrow

        return ArrowRows.unpacked(packed[_ARROW])
    if _RECORDS in packed:
        return _unpack_records(packed[_RECORDS])
    return {name: unpack_state(each) for name, each in packed.items()}


def _unpack_records(packed: Mapping[str, Any]) -> Records:
    dtypes = {"source_keys": np.uint32, "source_index": np.int32}
    arrays: dict[str, Any] = {name: np.frombuffer(packed[name], dtypes.get(name, np.int64)) for name in _ARRAYS}
    return Records(
        kind=Kind(packed["kind"]),
        buffer=np.frombuffer(packed["payloads"] + bytes(PADDING), np.uint8),
        offsets=np.cumsum(arrays["lengths"]) - arrays["lengths"],
        sources=tuple(packed["sources"]),
        **arrays,
    )


def to_json(state: Mapping[str, Any]) -> str:
    """A position that an iterator's `state_dict` gave, as one line of text."""
    return json.dumps(_texts(state), separators=(",", ":"))


def _texts(value: Any) -> Any:
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [_texts(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _texts(each) for name, each in value.items()}
    return value


def from_json(text: str) -> dict[str, Any]:
    """What `to_json` was given."""
    try:
        found = json.loads(text, object_hook=lambda each: base64.b64decode(each[_BYTES]) if _BYTES in each else each)
    except ValueError as error:
        raise InvalidRequestError(f"not a saved position: {error}") from None
    if not isinstance(found, dict):
        raise InvalidRequestError(f"not a saved position: {text[:60]!r}")
    return found
