"""FFM: every feature keeps one latent vector per partner field."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FFM"]


class FFM(nn.Module):
    """Field-aware factorization machine over embedded features.

    A row of feature i is [w, v_0, ..., v_(F-1)]: a weight and, for every field j, the vector used against field j.
    The logit is bias + sum of w + sum over i < j of <v_(i,j), v_(j,i)>.

    Args:
        fields: F, number of features.
        dim: Length of one latent vector.
    """

    def __init__(self, fields: int, dim: int = 4) -> None:
        super().__init__()
        self.fields = fields
        self.dim = dim
        self.bias = nn.Parameter(torch.zeros(1))

    @property
    def row_dim(self) -> int:
        """Floats that an embedding row must have."""
        return 1 + self.fields * self.dim

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits float32[b] for rows float32[b, F, row_dim]."""
        linear = rows[:, :, 0].sum(1)
        vectors = rows[:, :, 1:].reshape(
            -1, self.fields, self.fields, self.dim
        )  # [b, i, j, dim]: feature i against field j
        pairs = (vectors * vectors.transpose(1, 2)).sum(3)  # [b, i, j], symmetric
        crossed = (pairs.sum((1, 2)) - pairs.diagonal(dim1=1, dim2=2).sum(1)) / 2
        logits: Tensor = self.bias + linear + crossed
        return logits
