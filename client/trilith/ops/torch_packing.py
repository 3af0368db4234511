"""`trilith.ops.packing` for tensors of any device: for an all-reduce, and for the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.ops.packing import ALIGN, Shape, aligned_starts, known_shape, meta_sizes

__all__ = [
    "aligned_flat_concat",
    "aligned_flat_split",
    "pack_tensors",
    "pack_typed_keyed_tensors",
    "static_reshape",
    "unpack_packed_tensors",
    "unpack_tensors",
]


def aligned_flat_concat(inputs: Sequence[Tensor], scale: float | Tensor = 1.0, *, align: int = ALIGN) -> Tensor:
    """float32: the tensors one after another, each scaled and at a multiple of `align` floats, zeros between."""
    starts, total = aligned_starts([each.numel() for each in inputs], align)
    flat = torch.zeros(total, dtype=torch.float32, device=inputs[0].device if inputs else None)
    for start, each in zip(starts, inputs, strict=True):
        flat[start : start + each.numel()] = each.reshape(-1) * scale
    return flat


def aligned_flat_split(inputs: Sequence[Tensor], flat: Tensor, *, align: int = ALIGN) -> list[Tensor]:
    """Views of `flat` with the shapes of `inputs`, where `aligned_flat_concat` put them."""
    starts, total = aligned_starts([each.numel() for each in inputs], align)
    if flat.shape != (total,):
        raise InvalidRequestError(f"flat has shape {tuple(flat.shape)}, the inputs make ({total},)")
    return [flat[start : start + each.numel()].view(each.shape) for start, each in zip(starts, inputs, strict=True)]


def pack_tensors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Put tensors of one dtype one after another, by sorted key; also their sizes, int64[keys] on the CPU."""
    given = [tensors[key] for key in sorted(tensors)]
    kinds = {each.dtype for each in given}
    if len(kinds) > 1:
        raise InvalidRequestError(f"tensors of {', '.join(sorted(map(str, kinds)))} cannot be packed into one")
    flat = torch.cat([each.reshape(-1) for each in given]) if given else torch.empty(0)
    return flat, torch.tensor([each.numel() for each in given], dtype=torch.int64)


def unpack_tensors(shapes: Mapping[str, Shape], packed: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Undo `pack_tensors`; one dimension of each shape may be None."""
    return _cut(shapes, packed[0], packed[1].tolist())


def pack_typed_keyed_tensors(groups: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """One flat tensor per group, then int64 on the CPU: how many tensors each group has, and the size of every one."""
    packed = [pack_tensors(group) for group in groups]
    counts = torch.tensor([len(group) for group in groups], dtype=torch.int64)
    return [*(flat for flat, _ in packed), torch.cat([counts, *(sizes for _, sizes in packed)])]


def unpack_packed_tensors(shapes: Sequence[Mapping[str, Shape]], packed: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Undo `pack_typed_keyed_tensors`; one dimension of each shape may be None."""
    sizes = meta_sizes([len(group) for group in shapes], len(packed), packed[-1].tolist() if packed else [])
    return [_cut(*each) for each in zip(shapes, packed, sizes, strict=False)]


def static_reshape(inputs: Sequence[Tensor], shapes: Sequence[Shape | None]) -> tuple[list[Tensor], Tensor]:
    """Reshape many tensors, one dimension of each may be None; also their sizes, int64 on the CPU."""
    if len(inputs) != len(shapes):
        raise InvalidRequestError(f"{len(inputs)} tensors for {len(shapes)} shapes")
    out = [
        each.reshape(known_shape(str(i), each.numel(), shape))
        for i, (each, shape) in enumerate(zip(inputs, shapes, strict=True))
    ]
    return out, torch.tensor([each.numel() for each in inputs], dtype=torch.int64)


def _cut(shapes: Mapping[str, Shape], flat: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    if len(sizes) != len(shapes) or min(sizes, default=0) < 0 or sum(sizes) != flat.numel():
        raise InvalidRequestError(f"sizes {sizes} do not cut {flat.numel()} values for {len(shapes)} keys")
    pieces = torch.split(flat, sizes) if sizes else ()
    return {
        key: piece.reshape(known_shape(key, piece.numel(), shapes[key]))
        for key, piece in zip(sorted(shapes), pieces, strict=True)
    }
