"""DeepFM: a factorization machine and a multi-layer perceptron over the same embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["DeepFM"]


class DeepFM(nn.Module):
    """Sum of a linear part, a factorization machine and an MLP; they share the embeddings.

    A row of a feature is [w, v]: a weight and one latent vector.

    Args:
        fields: F, number of features.
        dim: Length of the latent vector.
        hidden: Widths of the MLP's hidden layers.
        dropout: Chance of dropping a hidden unit while training.
    """

    def __init__(self, fields: int, dim: int = 16, *, hidden: Sequence[int] = (256, 128), dropout: float = 0.0) -> None:
        super().__init__()
        self.fields = fields
        self.dim = dim
        self.bias = nn.Parameter(torch.zeros(1))
        layers: list[nn.Module] = []
        width = fields * dim
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = next_width
        layers.append(nn.Linear(width, 1))
        self.mlp = nn.Sequential(*layers)

    @property
    def row_dim(self) -> int:
        """Floats that an embedding row must have."""
        return 1 + self.dim

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits float32[b] for rows float32[b, F, row_dim]."""
        linear = rows[:, :, 0].sum(1)
        vectors = rows[:, :, 1:]
        summed = vectors.sum(1)
        crossed = (summed.square() - vectors.square().sum(1)).sum(1) / 2
        deep: Tensor = self.mlp(vectors.flatten(1)).squeeze(1)
        return self.bias + linear + crossed + deep
