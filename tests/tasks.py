"""A task with every kind of feature that there is, batches of it, and the same samples as requests have them."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from trilith.estimator import Dense, Embedding, Estimator, Label, RunConfig, Sequence, Task
from trilith.tables import Adagrad
from trilith_proto.example_pb2 import Example
from trilith_proto.proto_parser_pb2 import Instance

__all__ = ["Everything", "batch", "everything", "examples", "instances", "rows"]

SIZE = 24
CITIES = ["Berlin", "São Paulo", "東京", "10115", "", "a longer name than thirty-two bytes, which is hashed otherwise"]


class Everything(Task):
    """All that `trilith.estimator` has of features; two heads, and a prediction beside them."""

    user = Embedding(dim=4, optimizer=Adagrad(learning_rate=0.5))
    city = Embedding(dim=3, pooling="sum", optimizer=Adagrad(learning_rate=0.5))
    item = Embedding(dim=4, bias=True, optimizer=Adagrad(learning_rate=0.5))
    tags = Embedding(dim=2, pooling="mean", weights="tag_weights", optimizer=Adagrad(learning_rate=0.5))
    tag_sum = tags.view(pooling="sum", feature="tags")
    tag_root = tags.view(pooling="sqrtn", feature="tags", weights="tag_weights")
    tag_sums = tags.view(pooling="sum", feature="tags", weights="tag_weights")
    seen = Sequence(item, length=4)
    places = Sequence(city, length=2)
    context = Dense(2)
    loose = Dense(3, lengths="fit")
    year = Dense(1, feature="born")
    decade = Embedding(dim=2, feature="born", optimizer=Adagrad(learning_rate=0.5))
    idle = Embedding(dim=2)  # the model makes no use of it
    labels: ClassVar = {"click": Label(), "buy": Label(weight=3.0)}
    signatures: ClassVar = {"clicks": ("click",), "user": "user_tower", "parts": "parts_of_items"}

    def build(self) -> None:
        self.tower = nn.Linear(7, 5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.trunk = nn.Sequential(nn.LazyLinear(8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({name: nn.Linear(8, 1) for name in self.labels})
        self.register_buffer("steps", torch.zeros(()))  # of training's own, beside running means

    def forward(self, x: Any) -> dict[str, torch.Tensor]:
        if self.training:
            self.steps += 1
        history, _ = self.attention(
            x.item.vector[:, None], x.seen.values, x.seen.values, key_padding_mask=~x.seen.mask, need_weights=False
        )
        history = torch.nan_to_num(history)[:, 0]
        places = x.places.values.sum(1) / x.places.mask.sum(1, keepdim=True).clamp(min=1)
        tags = [x.tags.vector, x.tag_sum.vector, x.tag_root.vector, x.tag_sums.vector]
        dense = [x.context, x.loose, x.year / 1000, self.steps.expand(len(history), 1) / 10]
        given = [x.user.vector, x.city.vector, x.item.vector, *tags, history, places, x.decade.vector, *dense]
        deep = self.trunk(torch.cat(given, 1))
        return {name: head(deep)[:, 0] + x.item.bias for name, head in self.heads.items()}

    def user_tower(self, x: Any) -> torch.Tensor:
        scale = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5])  # a constant, of this signature alone
        return torch.tanh(self.tower(torch.cat([x.user.vector, x.city.vector], 1))) * scale

    def parts_of_items(self, x: Any) -> dict[str, torch.Tensor]:
        ones = torch.tensor([3.0])
        return {"bias": x.item.bias * ones, "seen": x.seen.mask.sum(1).float() * torch.ones(x.user.vector.shape[0])}

    def predictions(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {name: torch.sigmoid(each) for name, each in outputs.items()}
        return found | {"both": torch.stack([found["click"], found["click"] * found["buy"]], 1)}


def batch(seed: int = 0, size: int = SIZE) -> dict[str, Any]:
    """Samples, some of them without history, tags or loose numbers, as a loader gives them."""
    rng = np.random.default_rng(seed)

    def lists(most: int, least: int = 0) -> list[list[int]]:
        return [rng.integers(0, 12, rng.integers(least, most + 1)).tolist() for _ in range(size)]

    tags = lists(4)
    found: dict[str, Any] = {
        "user": rng.integers(0, 2**63, size, np.uint64) % 20 + 2**63,
        "city": [CITIES[i] for i in rng.integers(0, len(CITIES), size)],
        "item": rng.integers(0, 12, size),
        "tags": tags,
        "tag_weights": [rng.normal(1, 0.5, len(each)).astype(np.float32).tolist() for each in tags],
        "seen": lists(7),
        "places": [[CITIES[i % len(CITIES)] for i in each] for each in lists(4)],
        "context": rng.normal(size=(size, 2)).astype(np.float32),
        "loose": [rng.normal(size=len(each)).astype(np.float32).tolist() for each in lists(3)],
        "born": rng.integers(1900, 2020, size),
        "idle": lists(2),
    }
    found["seen"][0] = found["tags"][0] = found["tag_weights"][0] = found["places"][0] = found["loose"][0] = []
    found["click"] = rng.integers(0, 2, size).astype(np.float32)
    found["buy"] = np.where(rng.random(size) < 0.4, np.nan, found["click"])
    return found


def everything(run: RunConfig, *, batches: int = 6) -> Estimator:
    """A job that trains on some batches."""
    task = Everything(dense_optimizer=lambda parameters: torch.optim.Adam(parameters, 0.05))
    return Estimator(task, run, train=lambda: [batch(seed) for seed in range(batches)])


def rows(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples as JSON has them: a number, text or list by feature; without labels."""
    columns = {name: _plain(values) for name, values in given.items() if name not in ("click", "buy")}
    return [{name: values[row] for name, values in columns.items()} for row in range(len(given["user"]))]


def examples(given: dict[str, Any]) -> list[bytes]:
    """The samples as serialized Examples, as logs have them."""
    found = []
    for row in rows(given):
        made = Example()
        for name, value in row.items():
            values = value if isinstance(value, list) else [value]
            feature = made.named_feature.add(name=name).feature
            if any(isinstance(each, str) for each in values):
                feature.bytes_list.value.extend([each.encode() for each in values])
            elif name in ("context", "loose", "tag_weights"):
                feature.float_list.value.extend(values)
            elif name == "born":
                feature.int64_list.value.extend(values)
            else:
                feature.fid_v2_list.value.extend(values)
        found.append(made.SerializeToString())
    return found


def instances(given: dict[str, Any]) -> list[bytes]:
    """The samples as serialized Instances."""
    found = []
    for row in rows(given):
        made = Instance()
        for name, value in row.items():
            values = value if isinstance(value, list) else [value]
            feature = made.feature.add(name=name)
            if any(isinstance(each, str) for each in values):
                feature.bytes_value.extend([each.encode() for each in values])
            elif name in ("context", "loose", "tag_weights"):
                feature.float_value.extend(values)
            elif name == "born":
                feature.fid.extend(values)
                feature.float_value.extend(values)
            else:
                feature.fid.extend(values)
        found.append(made.SerializeToString())
    return found


def _plain(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, np.ndarray) else values
