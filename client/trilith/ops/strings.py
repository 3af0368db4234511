"""Ids of strings: xxHash64 of their UTF-8 bytes, over whole arrays at once; and what strings are taken from.

The hash is XXH64 as published (xxhash.com, 64-bit variant, seed 0 unless told), so ids can be made anywhere: Python's
`xxhash.xxh64_intdigest`, Spark's and DuckDB's and ClickHouse's functions of that name (mind their seeds). It will not
change: models are trained on it. Two of n strings meet in one id with a chance of about n^2 / 2^65.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import address_of, load_u8, load_u32, load_u64, store_u64
from trilith.ops.ragged import Ragged

__all__ = ["HashedIds", "hash_spans", "hash_strings", "string_array"]

UInt64Array = npt.NDArray[np.uint64]

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
_S1, _S7, _S11, _S12, _S18 = np.uint64(1), np.uint64(7), np.uint64(11), np.uint64(12), np.uint64(18)
_S23, _S27, _S29, _S31, _S32, _S33 = (np.uint64(by) for by in (23, 27, 29, 31, 32, 33))
_S64 = np.uint64(64)
# What np.int64 is inside a kernel, for the type checker: an int.
_int64 = cast("type[int]", np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class HashedIds(Ragged[np.int64]):
    """Lists of ids that came as strings: whoever serves what learned from them hashes, too."""


def hash_strings(values: Any, *, seed: int = 0) -> UInt64Array:
    """Ids of strings: uint64[n], XXH64 of each one's UTF-8 bytes.

    Args:
        values: Strings or bytes: an Arrow array of any string, binary or dictionary type, chunked or not; a NumPy array
            of strings or objects; or a sequence. Text counts by its UTF-8 bytes, as it is: nothing is trimmed, lowered
            or normalised.
        seed: 0..2^64-1; other seeds give other ids.

    Raises:
        InvalidRequestError: A value is null or no string.
    """
    if not 0 <= seed < 1 << 64:
        raise InvalidRequestError(f"seed={seed} is outside 0..2^64-1")
    array = string_array(values)
    if array.null_count:
        raise InvalidRequestError(f"{array.null_count} of {len(array)} strings are null: leave them out, or fill them")
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        return hash_strings(array.dictionary, seed=seed)[np.asarray(array.indices, np.int64)]
    out = np.empty(len(array), np.uint64)
    if len(array):
        _, offsets, data = array.buffers()
        bounds = np.frombuffer(offsets, np.int64, len(array) + 1, array.offset * 8)
        bytes_ = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        _hash(
            address_of(bytes_), address_of(bounds[:-1]), address_of(bounds[1:]), out.size, np.uint64(seed),
            address_of(out),
        )  # fmt: skip
    return out


def hash_spans(text: npt.NDArray[np.uint8], spans: npt.NDArray[np.int64]) -> UInt64Array:
    """Ids of pieces of a buffer, as `hash_strings` makes them.

    Args:
        text: uint8[size].
        spans: int64[n, 2]: where each begins, and its length; all within `text`.
    """
    out = np.empty(len(spans), np.uint64)
    starts = np.ascontiguousarray(spans[:, 0])
    stops = starts + spans[:, 1]
    _hash(address_of(text), address_of(starts), address_of(stops), out.size, np.uint64(0), address_of(out))
    return out


def string_array(values: Any) -> Any:
    """An Arrow array of strings or bytes with 64-bit offsets, or a dictionary array of such.

    Raises:
        InvalidRequestError: They are no strings.
    """
    import pyarrow as pa

    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not isinstance(values, pa.Array):
        if isinstance(values, np.ndarray) and values.dtype.kind in "US":
            values = values.tolist()  # fixed width: what fills it up is no part of a string
        try:
            values = pa.array(values, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InvalidRequestError(f"these are no strings: {error}") from None
    kind = values.type
    if pa.types.is_dictionary(kind):
        plain = string_array(values.dictionary)
        return values if plain is values.dictionary else pa.DictionaryArray.from_arrays(values.indices, plain)
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return values
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return values.cast(pa.large_string())
    if pa.types.is_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return values.cast(pa.large_binary())
    if pa.types.is_null(kind):
        return values.cast(pa.large_string())
    raise InvalidRequestError(f"values are {kind}, they must be strings or bytes")


@inlined
def _rotated(value: np.uint64, by: np.uint64) -> np.uint64:
    return (value << by) | (value >> (_S64 - by))


@inlined
def _round(lane: np.uint64, word: np.uint64) -> np.uint64:
    return _rotated(lane + word * _P2, _S31) * _P1


@inlined
def _merged(value: np.uint64, lane: np.uint64) -> np.uint64:
    return (value ^ _round(np.uint64(0), lane)) * _P1 + _P4


@kernel("void(int64, int64, int64, int64, uint64, int64)")
def _hash(data: int, starts: int, stops: int, count: int, seed: np.uint64, out: int) -> None:
    """XXH64 of `count` byte strings.

    Args:
        data: Address of the bytes.
        starts: Address of int64[count]: where each string begins.
        stops: Address of int64[count]: where each ends.
        count: Number of strings.
        seed: Of the hash.
        out: Address of uint64[count], written.
    """
    for row in range(count):
        start, stop = _int64(load_u64(starts, row)), _int64(load_u64(stops, row))
        at, end = data + start, data + stop
        if stop - start >= 32:
            a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
            while end - at >= 32:
                a, b = _round(a, load_u64(at, 0)), _round(b, load_u64(at, 1))
                c, d = _round(c, load_u64(at, 2)), _round(d, load_u64(at, 3))
                at += 32
            value = _rotated(a, _S1) + _rotated(b, _S7) + _rotated(c, _S12) + _rotated(d, _S18)
            value = _merged(_merged(_merged(_merged(value, a), b), c), d)
        else:
            value = seed + _P5
        value += np.uint64(stop - start)
        while end - at >= 8:
            value = _rotated(value ^ _round(np.uint64(0), load_u64(at, 0)), _S27) * _P1 + _P4
            at += 8
        if end - at >= 4:
            value = _rotated(value ^ (np.uint64(load_u32(at, 0)) * _P1), _S23) * _P2 + _P3
            at += 4
        while at < end:
            value = _rotated(value ^ (np.uint64(load_u8(at, 0)) * _P5), _S11) * _P1
            at += 1
        value = (value ^ (value >> _S33)) * _P2
        value = (value ^ (value >> _S29)) * _P3
        store_u64(out, row, value ^ (value >> _S32))
