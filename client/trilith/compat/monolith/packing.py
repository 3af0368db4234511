"""Many arrays in one: aligned for an all-reduce, keyed for the wire; and reshaped all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Int64Array, as_floats, as_integers

__all__ = [
    "ALIGN",
    "MOST_INPUTS",
    "Shape",
    "aligned_flat_concat",
    "aligned_flat_split",
    "aligned_starts",
    "known_shape",
    "meta_sizes",
    "pack_tensors",
    "pack_typed_keyed_tensors",
    "static_reshape",
    "unpack_packed_tensors",
    "unpack_tensors",
]

Array = npt.NDArray[Any]
Shape = Sequence[int | None]

MOST_INPUTS = 1023
"""Arrays that one concatenation takes."""
ALIGN = 16
"""Floats to which pieces are aligned unless told otherwise: 64 bytes, a cache line and a vector register."""


def aligned_flat_concat(
    inputs: Sequence[npt.ArrayLike], scale: float = 1.0, *, align: int = ALIGN
) -> npt.NDArray[np.float32]:
    """Put arrays one after another, each scaled and at a multiple of `align` floats, zeros between.

    Args:
        inputs: At most 1023 float32 arrays.
        scale: What all values are multiplied by.
        align: A power of two.
    """
    arrays = [as_floats(f"inputs[{i}]", each) for i, each in enumerate(inputs)]
    starts, total = aligned_starts([array.size for array in arrays], align)
    flat = np.zeros(total, np.float32)
    for start, array in zip(starts, arrays, strict=True):
        np.multiply(array.reshape(-1), np.float32(scale), out=flat[start : start + array.size])
    return flat


def aligned_flat_split(
    inputs: Sequence[npt.ArrayLike], flat: npt.NDArray[np.float32], *, align: int = ALIGN
) -> list[npt.NDArray[np.float32]]:
    """Views of `flat` with the shapes of `inputs`, where `aligned_flat_concat` put them."""
    shapes = [np.shape(each) for each in inputs]
    sizes = [int(np.prod(shape)) for shape in shapes]
    starts, total = aligned_starts(sizes, align)
    if flat.shape != (total,):
        raise InvalidRequestError(f"flat has shape {flat.shape}, the inputs make ({total},)")
    return [flat[start : start + size].reshape(shape) for start, size, shape in zip(starts, sizes, shapes, strict=True)]


def aligned_starts(sizes: Sequence[int], align: int) -> tuple[list[int], int]:
    """Where pieces of these sizes begin if each begins at a multiple of `align`, and where the last one ends so."""
    if align < 1 or align & (align - 1):
        raise InvalidRequestError(f"align={align} is no power of two")
    if len(sizes) > MOST_INPUTS:
        raise InvalidRequestError(f"{len(sizes)} inputs are more than {MOST_INPUTS}")
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // align) * align
    return starts, total


def pack_tensors(tensors: Mapping[str, npt.ArrayLike]) -> tuple[Array, Int64Array]:
    """Put arrays of one dtype one after another, by sorted key; also their sizes, int64[keys]."""
    arrays = [np.asarray(tensors[key]) for key in sorted(tensors)]
    kinds = {array.dtype for array in arrays}
    if len(kinds) > 1:
        raise InvalidRequestError(f"arrays of {', '.join(sorted(map(str, kinds)))} cannot be packed into one")
    flat = np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.empty(0, np.float32)
    return flat, np.array([array.size for array in arrays], np.int64)


def unpack_tensors(shapes: Mapping[str, Shape], packed: tuple[Array, npt.ArrayLike]) -> dict[str, Array]:
    """Undo `pack_tensors`.

    Args:
        shapes: By key; one dimension of each may be None.
        packed: What `pack_tensors` gave.
    """
    flat, sizes = packed[0], as_integers("sizes", packed[1], shape=(len(shapes),))
    return _cut(shapes, flat, sizes)


def _cut(shapes: Mapping[str, Shape], flat: Array, sizes: Int64Array) -> dict[str, Array]:
    if (sizes < 0).any() or sizes.sum() != flat.size:
        raise InvalidRequestError(f"sizes {sizes.tolist()} do not cut {flat.size} values")
    pieces = np.split(flat, np.cumsum(sizes)[:-1]) if sizes.size else []
    return {
        key: piece.reshape(known_shape(key, piece.size, shapes[key]))
        for key, piece in zip(sorted(shapes), pieces, strict=True)
    }


def pack_typed_keyed_tensors(groups: Sequence[Mapping[str, npt.ArrayLike]]) -> list[Array]:
    """Put the arrays of each group, which are of one dtype, one after another, by sorted key.

    Returns:
        One flat array per group, then int64: the number of arrays of every group, followed by the size of every array.
    """
    packed = [pack_tensors(group) for group in groups]
    counts = np.array([len(group) for group in groups], np.int64)
    return [*(flat for flat, _ in packed), np.concatenate([counts, *(sizes for _, sizes in packed)])]


def unpack_packed_tensors(
    shapes: Sequence[Mapping[str, Shape]], packed: Sequence[npt.ArrayLike]
) -> list[dict[str, Array]]:
    """Undo `pack_typed_keyed_tensors`.

    Args:
        shapes: Per group by key; one dimension of each may be None.
        packed: What `pack_typed_keyed_tensors` gave.
    """
    meta = as_integers("sizes", packed[-1], shape=(-1,)).tolist() if len(packed) else []
    sizes = meta_sizes([len(group) for group in shapes], len(packed), meta)
    return [
        _cut(group, np.asarray(flat), np.array(each, np.int64))
        for group, flat, each in zip(shapes, packed, sizes, strict=False)
    ]


def meta_sizes(counts: Sequence[int], arrays: int, meta: Sequence[int]) -> list[list[int]]:
    """Per group the sizes of its arrays.

    Args:
        counts: Arrays of each group.
        arrays: How many were packed, `meta` among them.
        meta: The counts, followed by all sizes.
    """
    groups = len(counts)
    if arrays != groups + 1:
        raise InvalidRequestError(f"{arrays} arrays for {groups} groups; one each and the sizes are needed")
    if list(meta[:groups]) != list(counts) or len(meta) != groups + sum(counts):
        raise InvalidRequestError(f"the arrays were packed as {list(meta[:groups])}, the shapes name {list(counts)}")
    starts = np.cumsum([groups, *counts])
    return [list(meta[start : start + count]) for start, count in zip(starts, counts, strict=False)]


def static_reshape(inputs: Sequence[npt.ArrayLike], shapes: Sequence[Shape | None]) -> tuple[list[Array], Int64Array]:
    """Reshape many arrays.

    Args:
        inputs: Arrays.
        shapes: The shape of each; one dimension may be None, and is worked out.

    Returns:
        The arrays, and their sizes, int64.
    """
    if len(inputs) != len(shapes):
        raise InvalidRequestError(f"{len(inputs)} arrays for {len(shapes)} shapes")
    arrays = [np.asarray(each) for each in inputs]
    out = [
        array.reshape(known_shape(str(i), array.size, shape))
        for i, (array, shape) in enumerate(zip(arrays, shapes, strict=True))
    ]
    return out, np.array([array.size for array in arrays], np.int64)


def known_shape(name: str, size: int, shape: Shape | None) -> tuple[int, ...]:
    """A shape for `size` values with its unknown dimension worked out; next to a dimension of 0 it is 0."""
    if shape is None:
        raise InvalidRequestError(f"array {name}: the rank of its shape must be known")
    unknown = [i for i, each in enumerate(shape) if each is None or each == -1]
    if len(unknown) > 1:
        raise InvalidRequestError(
            f"array {name}: shape {list(shape)} has {len(unknown)} unknown dimensions, at most 1 may be"
        )
    known = [0 if i in unknown else int(each or 0) for i, each in enumerate(shape)]
    if any(each < 0 for each in known):
        raise InvalidRequestError(f"array {name}: shape {list(shape)} has a negative dimension")
    rest = int(np.prod([each for i, each in enumerate(known) if i not in unknown]))
    if unknown and rest and size % rest:
        raise InvalidRequestError(f"array {name}: {size} values cannot be divided by {rest} for shape {list(shape)}")
    if unknown and rest:
        known[unknown[0]] = size // rest
    if int(np.prod(known)) != size:
        raise InvalidRequestError(f"array {name}: {size} values do not have shape {list(shape)}")
    return tuple(known)
