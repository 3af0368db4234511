"""Feature ids: how slot and signature share 64 bits, and the hashes that ids and data source keys are made with.

| layout | slot                 | signature    |
|--------|----------------------|--------------|
| v1     | bits 63..54, 0..1023 | bits 53..0   |
| v2     | bits 62..48, 0..32767| bits 47..0; bit 63 is 0 |

Every function takes an integer and returns an int, or takes an array (uint64, or int64 with the same bits) and returns
one.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError

__all__ = [
    "MAX_SLOTS",
    "SIGNATURE_V1",
    "SIGNATURE_V2",
    "check_fid_v2",
    "city_hash64",
    "data_source_key",
    "extract_fid",
    "java_hash",
    "make_fid_v1",
    "make_fid_v2",
    "reslot_v1",
    "reslot_v2",
    "slot_of_v1",
    "slot_of_v2",
    "v1_to_v2",
]

UInt64Array = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.uint64] | npt.NDArray[np.int64]

MAX_SLOTS = 32768
"""Slots of the v2 layout; the v1 layout has 1024."""
SIGNATURE_V1 = (1 << 54) - 1
SIGNATURE_V2 = (1 << 48) - 1

_MASK64 = (1 << 64) - 1
_SLOTS_V1 = 1024
_K2 = 0x9AE16A3B2F90404F


def _words(values: Any) -> tuple[UInt64Array, bool]:
    """Values as uint64 bit patterns, and whether there was only one."""
    if isinstance(values, int | np.integer):
        return np.array(int(values) & _MASK64, np.uint64), True
    array = np.asarray(values)
    if array.dtype == object or array.dtype.kind not in "iu":
        raise InvalidRequestError(f"fids, slots and signatures are integers, not {array.dtype}")
    return array.astype(np.int64).view(np.uint64) if array.dtype.kind == "i" else array.astype(
        np.uint64
    ), array.ndim == 0


def _result(words: Any, single: bool) -> Any:
    return int(words) if single else words


def _make(slot: Any, signature: Any, shift: int, slots: int, mask: int) -> Any:
    given = np.asarray(slot)
    if given.size and (int(given.min()) < 0 or int(given.max()) >= slots):
        wrong = int(given.min()) if int(given.min()) < 0 else int(given.max())
        raise InvalidRequestError(f"slot {wrong} is outside 0..{slots - 1}")
    high, one_slot = _words(slot)
    low, one_signature = _words(signature)
    return _result((high << np.uint64(shift)) | (low & np.uint64(mask)), one_slot and one_signature)


@overload
def make_fid_v1(slot: int, signature: int) -> int: ...
@overload
def make_fid_v1(slot: int, signature: Integers) -> UInt64Array: ...
@overload
def make_fid_v1(slot: Integers, signature: int | Integers) -> UInt64Array: ...
def make_fid_v1(slot: Any, signature: Any) -> Any:
    """The v1 id of a slot below 1024 and the low 54 bits of a signature."""
    return _make(slot, signature, 54, _SLOTS_V1, SIGNATURE_V1)


@overload
def make_fid_v2(slot: int, signature: int) -> int: ...
@overload
def make_fid_v2(slot: int, signature: Integers) -> UInt64Array: ...
@overload
def make_fid_v2(slot: Integers, signature: int | Integers) -> UInt64Array: ...
def make_fid_v2(slot: Any, signature: Any) -> Any:
    """The v2 id of a slot below 32768 and the low 48 bits of a signature."""
    return _make(slot, signature, 48, MAX_SLOTS, SIGNATURE_V2)


@overload
def slot_of_v1(fid: int) -> int: ...
@overload
def slot_of_v1(fid: Integers) -> UInt64Array: ...
def slot_of_v1(fid: Any) -> Any:
    """Slot of a v1 id."""
    words, single = _words(fid)
    return _result(words >> np.uint64(54), single)


@overload
def slot_of_v2(fid: int) -> int: ...
@overload
def slot_of_v2(fid: Integers) -> UInt64Array: ...
def slot_of_v2(fid: Any) -> Any:
    """Slot of a v2 id."""
    words, single = _words(fid)
    return _result((words >> np.uint64(48)) & np.uint64(MAX_SLOTS - 1), single)


@overload
def check_fid_v2(fid: int) -> int: ...
@overload
def check_fid_v2(fid: Integers) -> UInt64Array: ...
def check_fid_v2(fid: Any) -> Any:
    """The same ids; InvalidRequestError if one has bit 63 set, which no v2 id has."""
    words, single = _words(fid)
    wrong = words[words >> np.uint64(63) != 0] if words.ndim else words[None][words[None] >> np.uint64(63) != 0]
    if wrong.size:
        raise InvalidRequestError(f"fid {int(wrong[0])} is no v2 id: its highest bit is set")
    return _result(words, single)


@overload
def v1_to_v2(fid: int) -> int: ...
@overload
def v1_to_v2(fid: Integers) -> UInt64Array: ...
def v1_to_v2(fid: Any) -> Any:
    """The v2 id of a v1 id's slot and the low 48 bits of its signature; bits 48 to 53 are lost."""
    words, single = _words(fid)
    return _result(((words >> np.uint64(54)) << np.uint64(48)) | (words & np.uint64(SIGNATURE_V2)), single)


@overload
def reslot_v1(fid: int, slot: int) -> int: ...
@overload
def reslot_v1(fid: Integers, slot: int) -> UInt64Array: ...
def reslot_v1(fid: Any, slot: int) -> Any:
    """v1 ids with their signatures, in another slot."""
    return make_fid_v1(slot, fid)


@overload
def reslot_v2(fid: int, slot: int) -> int: ...
@overload
def reslot_v2(fid: Integers, slot: int) -> UInt64Array: ...
def reslot_v2(fid: Any, slot: int) -> Any:
    """v2 ids with their signatures, in another slot."""
    return make_fid_v2(slot, fid)


# ---- hashes --------------------------------------------------------------------------------------------------------


def java_hash(name: str | bytes) -> int:
    """Java's hash of a string, over signed UTF-8 bytes where Java takes UTF-16 units: an int32."""
    result = 0
    for byte in name.encode() if isinstance(name, str) else name:
        result = (31 * result + (byte - 256 if byte > 127 else byte)) & 0xFFFFFFFF
    return result - (1 << 32) if result >> 31 else result


def data_source_key(name: str | bytes) -> int:
    """What stands for a data source in headers and samples: the low 24 bits of its hash, shifted up by 8."""
    return (java_hash(name) << 8) & 0xFFFFFFFF


def city_hash64(data: bytes) -> int:
    """CityHash64 of 8 to 16 bytes, the only lengths that feature ids are made of."""
    if not 8 <= len(data) <= 16:
        raise InvalidRequestError(f"city_hash64 is for 8 to 16 bytes, not {len(data)}")
    first = int.from_bytes(data[:8], "little")
    last = int.from_bytes(data[-8:], "little")
    m = (_K2 + 2 * len(data)) & _MASK64
    return int(_city(np.array([first], np.uint64), np.array([last], np.uint64), np.uint64(m))[0])


@overload
def extract_fid(value: int, slot: int) -> int: ...
@overload
def extract_fid(value: Integers, slot: int) -> UInt64Array: ...
def extract_fid(value: Any, slot: int) -> Any:
    """v2 ids whose signatures are CityHash64 of the values' eight little-endian bytes."""
    words, single = _words(value)
    rows = np.atleast_1d(words)
    hashed = _city(rows, rows, np.uint64((_K2 + 16) & _MASK64))
    fids = make_fid_v2(slot, hashed)
    return int(fids[0]) if single else fids.reshape(words.shape)


def _rotated(words: UInt64Array, by: int) -> UInt64Array:
    return (words >> np.uint64(by)) | (words << np.uint64(64 - by))


def _city(first: UInt64Array, last: UInt64Array, m: np.uint64) -> UInt64Array:
    """CityHash64 of inputs of one length in 8..16, given their first and last eight bytes; arithmetic wraps."""
    shift = np.uint64(47)
    a = first + np.uint64(_K2)
    c = _rotated(last, 37) * m + a
    d = (_rotated(a, 25) + last) * m
    x = (c ^ d) * m
    x ^= x >> shift
    y = (d ^ x) * m
    y ^= y >> shift
    result: UInt64Array = y * m
    return result
