"""Vectors of several tables gathered from one flat buffer by their float offsets, and the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of, as_index, copy_floats, load_u32, prefetch
from trilith.ops.ragged import as_floats
from trilith.ops.threads import in_parts, thread_count
from trilith.ops.vectors import add_scaled

__all__ = ["fused_gather_embeddings_by_input", "fused_gather_embeddings_by_input_gradient"]

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

_AHEAD = 12


@kernel("void(int64, int64, int64, int64, int64)")
def gather_at(fused: int, offsets: int, n: int, dim: int, out: int) -> None:
    """Copy `dim` floats from each offset.

    Args:
        fused: Address of the buffer.
        offsets: Address of uint32[n], in floats.
        n: Number of vectors.
        dim: Floats per vector.
        out: Address of float32[n, dim], written.
    """
    for i in range(n):
        if i + _AHEAD < n:
            address = fused + 4 * as_index(load_u32(offsets, i + _AHEAD))
            for line in range(0, 4 * dim, 64):
                prefetch(address + line)
        copy_floats(out + 4 * dim * i, fused + 4 * as_index(load_u32(offsets, i)), dim)


@kernel("void(int64, int64, int64, int64, int64, float32)")
def add_at(out: int, offsets: int, n: int, dim: int, grads: int, scale: np.float32) -> None:
    """Add each vector of `grads`, scaled, at its offset.

    Args:
        out: Address of the buffer, added to.
        offsets: Address of uint32[n], in floats.
        n: Number of vectors.
        dim: Floats per vector.
        grads: Address of float32[n, dim].
        scale: What the gradients are multiplied by.
    """
    for i in range(n):
        if i + _AHEAD < n:
            address = out + 4 * as_index(load_u32(offsets, i + _AHEAD))
            for line in range(0, 4 * dim, 64):
                prefetch(address + line)
        add_scaled(out + 4 * as_index(load_u32(offsets, i)), grads + 4 * dim * i, dim, scale)


def fused_gather_embeddings_by_input(
    fused_embeddings: npt.ArrayLike,
    offsets: Sequence[npt.ArrayLike],
    dims: Sequence[int],
    *,
    out: Sequence[Float32Array] | None = None,
    threads: int | None = None,
) -> list[Float32Array]:
    """Gather the vectors of K tables.

    Args:
        fused_embeddings: float32[E].
        offsets: K times int32[n_k]: where each vector begins.
        dims: K floats per vector.
        out: K times float32[n_k, dims[k]], C-contiguous, written instead of new arrays.
        threads: How many may work on it; None decides by size.

    Returns:
        K times float32[n_k, dims[k]].
    """
    fused = as_floats("fused_embeddings", fused_embeddings, shape=(-1,))
    starts = _offsets(offsets, dims, fused.size)
    if out is None:
        out = [np.empty((each.size, dim), np.float32) for each, dim in zip(starts, dims, strict=True)]
    if len(out) != len(starts):
        raise InvalidRequestError(f"{len(out)} arrays in out for {len(starts)} lists of offsets")
    for each, dim, rows in zip(starts, dims, out, strict=True):
        if rows.shape != (each.size, dim) or rows.dtype != np.float32 or not rows.flags.c_contiguous:
            raise InvalidRequestError(
                f"out is {rows.dtype}{rows.shape}, C-contiguous float32({each.size}, {dim}) is needed"
            )
        if not rows.flags.writeable:
            raise InvalidRequestError("out is read-only")
        _gather(fused, each, rows, threads)
    return list(out)


def _gather(fused: Float32Array, starts: Int32Array, rows: Float32Array, threads: int | None) -> None:
    n, dim = rows.shape

    def part(start: int, stop: int) -> None:
        gather_at(
            address_of(fused), address_of(starts) + 4 * start, stop - start, dim, address_of(rows) + 4 * dim * start
        )

    in_parts(part, n, thread_count(threads, 8 * n * dim))


def fused_gather_embeddings_by_input_gradient(
    size: int,
    grads: Sequence[npt.ArrayLike],
    offsets: Sequence[npt.ArrayLike],
    dims: Sequence[int],
    *,
    scale: float = 1.0,
) -> Float32Array:
    """Sum the gradients of the gathered vectors where they came from.

    Args:
        size: Floats of the buffer.
        grads: K times float32[n_k, dims[k]].
        offsets: K times int32[n_k], as given to the gather.
        dims: K floats per vector.
        scale: What all gradients are multiplied by.

    Returns:
        float32[size].
    """
    if size < 0:
        raise InvalidRequestError(f"size={size} is negative")
    starts = _offsets(offsets, dims, size)
    if len(grads) != len(starts):
        raise InvalidRequestError(f"{len(grads)} gradients for {len(starts)} lists of offsets")
    out = np.zeros(size, np.float32)
    for k, (each, dim, grad) in enumerate(zip(starts, dims, grads, strict=True)):
        rows = as_floats(f"grads[{k}]", grad, shape=(each.size, dim))
        add_at(address_of(out), address_of(each), each.size, dim, address_of(rows), np.float32(scale))
    return out


def _offsets(offsets: Sequence[npt.ArrayLike], dims: Sequence[int], size: int) -> list[Int32Array]:
    """int32, each vector within the buffer."""
    if len(offsets) != len(dims):
        raise InvalidRequestError(f"{len(offsets)} lists of offsets for {len(dims)} dims")
    checked = []
    for k, (each, dim) in enumerate(zip(offsets, dims, strict=True)):
        array = np.asarray(each)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise InvalidRequestError(
                f"offsets[{k}] are {array.dtype}{array.shape}, one-dimensional integers are needed"
            )
        if dim < 1:
            raise InvalidRequestError(f"dims[{k}]={dim} is below 1")
        if array.size and (array.min() < 0 or int(array.max()) + dim > size):
            bad = int(((array < 0) | (array > size - dim)).argmax())
            raise InvalidRequestError(f"offsets[{k}][{bad}]={array[bad]}: {dim} floats from there leave 0..{size}")
        checked.append(np.require(array, np.int32, ("C", "A")))
    return checked
