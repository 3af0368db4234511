"""Hashes that kernels and Python agree on: placement of ids, and the counter-based generator behind new rows."""

from __future__ import annotations

import numpy as np

from trilith.ops.jit import inlined

__all__ = ["mix64", "uniform01", "unmix64"]

_C1 = np.uint64(0xBF58476D1CE4E5B9)
_C2 = np.uint64(0x94D049BB133111EB)
_D1 = np.uint64(0x96DE1B173F119089)  # inverse of _C1 modulo 2^64
_D2 = np.uint64(0x319642B2D24D8EC3)  # inverse of _C2 modulo 2^64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_S30, _S27, _S31, _S40 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(40)
_S60, _S54, _S62 = np.uint64(60), np.uint64(54), np.uint64(62)
_UNIT = np.float32(2.0**-24)


@inlined
def mix64(value: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of uint64 that mixes every bit."""
    value = (value ^ (value >> _S30)) * _C1
    value = (value ^ (value >> _S27)) * _C2
    return value ^ (value >> _S31)


@inlined
def unmix64(value: np.uint64) -> np.uint64:
    """What `mix64` made `value` of."""
    value = (value ^ (value >> _S31) ^ (value >> _S62)) * _D2
    value = (value ^ (value >> _S27) ^ (value >> _S54)) * _D1
    return value ^ (value >> _S30) ^ (value >> _S60)


@inlined
def uniform01(stream: np.uint64, counter: np.uint64) -> np.float32:
    """Draw `counter` of `stream`, uniform on the multiples of 2^-24 in [0, 1)."""
    return np.float32(mix64(stream + (counter + np.uint64(1)) * _GOLDEN) >> _S40) * _UNIT
