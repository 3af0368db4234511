"""Rows of distributed ids brought to where the ids are used: by hashing, not by sorting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trilith.compat.monolith.row_ops import sum_rows_at
from trilith.errors import InvalidRequestError
from trilith.ops.hashing import mix64
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import address_of, as_index, copy_floats, load_u64, prefetch, store_u64
from trilith.ops.ragged import Int64Array, as_floats, as_integers
from trilith.ops.threads import in_parts, thread_count

__all__ = [
    "gather_embeddings_by_ids_gradient_back_prop",
    "gather_embeddings_by_input",
    "map_id_to_embedding",
    "map_id_to_embedding_gradient_back_prop",
]

Float32Array = npt.NDArray[np.float32]

_EMPTY = np.uint64(0)
_LIST = np.uint64(32)
_PLACE = np.uint64(0xFFFFFFFF)
_FIRST_LIST = np.uint64(1 << 32)
_GROUP = 32
_AHEAD = 16


@kernel("void(int64, int64, int64, int64, int64)")
def insert_ids(ids: int, n: int, number: int, cells: int, mask: int) -> None:
    """Remember where ids are; an id that is known stays where it was first.

    Args:
        ids: Address of uint64[n].
        n: Number of ids.
        number: Number of their list, from 1.
        cells: Address of uint64[mask + 1, 2], written: id, and number << 32 | place in the list; 0 in a free cell.
        mask: Cells minus one, a power of two minus one, more than half of which stay free.
    """
    mark = np.uint64(number) << _LIST
    for first in range(0, n, _GROUP):
        last = min(first + _GROUP, n)
        for i in range(first, last):
            prefetch(cells + 16 * as_index(mix64(load_u64(ids, i)) & np.uint64(mask)))
        for i in range(first, last):
            value = load_u64(ids, i)
            cell = as_index(mix64(value) & np.uint64(mask))
            while True:
                if load_u64(cells, 2 * cell + 1) == _EMPTY:
                    store_u64(cells, 2 * cell, value)
                    store_u64(cells, 2 * cell + 1, mark | np.uint64(i))
                    break
                if load_u64(cells, 2 * cell) == value:
                    break
                cell = (cell + 1) & mask


@kernel("int64(int64, int64, int64, int64, int64)")
def find_ids(ids: int, n: int, cells: int, mask: int, places: int) -> int:
    """Look up where ids are.

    Args:
        ids: Address of uint64[n].
        n: Number of ids.
        cells: Address of the cells that `insert_ids` filled.
        mask: Cells minus one.
        places: Address of uint64[n], written: list << 32 | place of each id, lists counted from 0.

    Returns:
        The first id that is not known; n if there is none.
    """
    for first in range(0, n, _GROUP):
        last = min(first + _GROUP, n)
        # `places` holds the cell between the two passes.
        for i in range(first, last):
            guess = mix64(load_u64(ids, i)) & np.uint64(mask)
            store_u64(places, i, guess)
            prefetch(cells + 16 * as_index(guess))
        for i in range(first, last):
            value = load_u64(ids, i)
            cell = as_index(load_u64(places, i))
            while True:
                place = load_u64(cells, 2 * cell + 1)
                if place == _EMPTY:
                    return i
                if load_u64(cells, 2 * cell) == value:
                    store_u64(places, i, np.uint64(place - _FIRST_LIST))
                    break
                cell = (cell + 1) & mask
    return n


@kernel("void(int64, int64, int64, int64, int64)")
def fetch_rows(places: int, n: int, bases: int, dim: int, out: int) -> None:
    """Copy rows that lie in several blocks.

    Args:
        places: Address of uint64[n], block << 32 | row.
        n: How many to copy.
        bases: Address of uint64[blocks]: address of each block.
        dim: Floats per row.
        out: Address of float32[n, dim], written.
    """
    for i in range(n):
        if i + _AHEAD < n:
            ahead = _address(load_u64(places, i + _AHEAD), bases, dim)
            for line in range(0, 4 * dim, 64):
                prefetch(ahead + line)
        copy_floats(out + 4 * dim * i, _address(load_u64(places, i), bases, dim), dim)


@inlined
def _address(place: np.uint64, bases: int, dim: int) -> int:
    return as_index(load_u64(bases, as_index(place >> _LIST))) + 4 * dim * as_index(place & _PLACE)


class _IdMap:
    """Where ids are: in which of several lists, at which place; of a repeated id the first place counts."""

    def __init__(self, ids: Sequence[npt.ArrayLike]) -> None:
        lists = [as_integers(f"ids[{p}]", each, shape=(-1,)) for p, each in enumerate(ids)]
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum([each.size for each in lists], dtype=np.int64)])
        size = 4
        while size < 2 * len(self):
            size *= 2
        self._cells = np.zeros((size, 2), np.uint64)
        for number, each in enumerate(lists, 1):
            insert_ids(address_of(each), each.size, number, address_of(self._cells), size - 1)

    def __len__(self) -> int:
        """Ids of all lists."""
        return int(self._bounds[-1])

    def find(self, ids: npt.ArrayLike, *, threads: int | None = None) -> Int64Array:
        """int64 of the shape of `ids`: list << 32 | place of each; an unknown id is InvalidRequestError."""
        wanted = as_integers("ids", ids)
        flat = wanted.reshape(-1)
        places = np.empty(flat.size, np.int64)

        def find_part(start: int, stop: int) -> None:
            found = find_ids(
                address_of(flat) + 8 * start,
                stop - start,
                address_of(self._cells),
                self._cells.shape[0] - 1,
                address_of(places) + 8 * start,
            )
            if found < stop - start:
                raise InvalidRequestError(f"place {start + found} has id {flat[start + found]}, which no list has")

        in_parts(find_part, flat.size, thread_count(threads, 32 * flat.size))
        return places.reshape(wanted.shape)

    def rows(self, places: Int64Array) -> Int64Array:
        """Places as row numbers that count through all lists."""
        rows: Int64Array = self._bounds[places >> 32] + (places & 0xFFFFFFFF)
        return rows

    def split(self, rows: Float32Array) -> list[Float32Array]:
        """Rows of all lists, list by list."""
        return np.split(rows, self._bounds[1:-1])


def map_id_to_embedding(
    ids: Sequence[npt.ArrayLike],
    embeddings: Sequence[npt.ArrayLike],
    wanted: npt.ArrayLike,
    *,
    threads: int | None = None,
) -> Float32Array:
    """Bring the rows of each id to where the id is used.

    Args:
        ids: P times int64[n_p]; of a repeated id the first row counts.
        embeddings: P times float32[n_p, d].
        wanted: int64 of any shape; every id must be in one of the lists.
        threads: How many may work on it; None decides by size.

    Returns:
        float32[*wanted.shape, d].
    """
    blocks = _blocks(ids, embeddings)
    places = _IdMap(ids)
    return _fetch(blocks, places.find(wanted, threads=threads), threads)


def map_id_to_embedding_gradient_back_prop(
    ids: Sequence[npt.ArrayLike], wanted: npt.ArrayLike, grads: npt.ArrayLike
) -> list[Float32Array]:
    """Sum the gradients of each id's uses.

    Args:
        ids: P times int64[n_p].
        wanted: int64 of any shape.
        grads: float32[*wanted.shape, d].

    Returns:
        P times float32[n_p, d], zero for ids that `wanted` does not use.
    """
    places = _IdMap(ids)
    rows = places.rows(places.find(wanted))
    values = as_floats("grads", grads)
    if values.ndim == 0 or values.shape[:-1] != rows.shape:
        raise InvalidRequestError(f"grads have shape {values.shape}, ({', '.join(map(str, rows.shape))}, d) is needed")
    return places.split(sum_rows_at(rows, values, len(places)))


def gather_embeddings_by_input(
    ids: npt.ArrayLike, embeddings: npt.ArrayLike, wanted: npt.ArrayLike, *, threads: int | None = None
) -> tuple[Float32Array, Int64Array]:
    """Bring the rows of one list's ids to where they are used.

    Args:
        ids: int64[m]; of a repeated id the first row counts.
        embeddings: float32[m, d].
        wanted: int64 of any shape.
        threads: How many may work on it; None decides by size.

    Returns:
        float32[*wanted.shape, d], and int64[*wanted.shape]: which row each is.
    """
    blocks = _blocks([ids], [embeddings])
    places = _IdMap([ids])
    mapping = places.find(wanted, threads=threads)
    return _fetch(blocks, mapping, threads), mapping


def gather_embeddings_by_ids_gradient_back_prop(
    ids: npt.ArrayLike, grads: npt.ArrayLike, index_mapping: npt.ArrayLike
) -> Float32Array:
    """Sum the gradients of each row's uses.

    Args:
        ids: int64[m]; only their number matters.
        grads: float32[*shape, d].
        index_mapping: int64[*shape], from `gather_embeddings_by_input`.

    Returns:
        float32[m, d].
    """
    rows, values = as_integers("index_mapping", index_mapping), as_floats("grads", grads)
    if values.ndim == 0 or values.shape[:-1] != rows.shape:
        raise InvalidRequestError(f"grads have shape {values.shape}, index_mapping has {rows.shape} and d comes after")
    return sum_rows_at(rows, values, as_integers("ids", ids, shape=(-1,)).size)


def _blocks(ids: Sequence[npt.ArrayLike], embeddings: Sequence[npt.ArrayLike]) -> list[Float32Array]:
    if len(ids) != len(embeddings) or not ids:
        raise InvalidRequestError(
            f"{len(ids)} lists of ids for {len(embeddings)} lists of embeddings; at least one pair"
        )
    first = np.asarray(embeddings[0])
    if first.ndim != 2:
        raise InvalidRequestError(f"embeddings[0] has shape {first.shape}, (n, d) is needed")
    dim = first.shape[1]
    return [
        as_floats(f"embeddings[{p}]", rows, shape=(np.asarray(some).size, dim))
        for p, (some, rows) in enumerate(zip(ids, embeddings, strict=True))
    ]


def _fetch(blocks: Sequence[Float32Array], places: Int64Array, threads: int | None) -> Float32Array:
    """float32[*places.shape, d]: the rows of C-contiguous blocks that an `_IdMap` found."""
    dim = blocks[0].shape[1]
    flat = places.reshape(-1)
    out = np.empty((flat.size, dim), np.float32)
    bases = np.array([address_of(block) for block in blocks], np.int64)

    def fetch_part(start: int, stop: int) -> None:
        fetch_rows(
            address_of(flat) + 8 * start, stop - start, address_of(bases), dim, address_of(out) + 4 * dim * start
        )

    in_parts(fetch_part, flat.size, thread_count(threads, 8 * dim * flat.size))
    return out.reshape(*places.shape, dim)
