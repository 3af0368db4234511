"""Options of features reach their tables, and rows are as old as the samples that they were learned from."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch

from trilith.data import from_arrow, from_records
from trilith.errors import InvalidRequestError
from trilith.estimator import Embedding, Estimator, Label, RunConfig, Task
from trilith.tables import Adagrad, Constants, Sgd, Zeros
from trilith_proto.example_pb2 import Example
from trilith_proto.ps_pb2 import TableConfig

DAY = 86_400
NOW = int(time.time())
OLD = NOW - 10 * DAY


class Timed(Task):
    user = Embedding(dim=2, ttl_days=7)
    labels: ClassVar = {"click": Label()}
    request_time = "when"

    def forward(self, x):
        return x.user.vector.sum(1)


def job(task: Task | None = None, **settings: Any) -> Estimator:
    return Estimator(task or Timed(), RunConfig(progress="none", **settings))


def there(estimator: Estimator, *ids: int) -> list[bool]:
    return estimator.client.contains("user", list(ids)).tolist()


def batch(ids: list[int], when: Any) -> dict[str, Any]:
    return {"user": ids, "click": [1.0] * len(ids), "when": when}


@pytest.mark.parametrize(
    "times",
    [
        lambda each: [each - 5, each],
        lambda each: np.array([each, each - 5]),
        lambda each: torch.tensor([[each], [each - 5]]),
        lambda each: pa.array([each, each - 5]),
        lambda each: pa.array([each, each - 5], pa.timestamp("s")),
        lambda each: np.array([each, each - 5], "datetime64[s]"),
    ],
)
def test_rows_expire_from_the_time_of_their_samples(times):
    with job() as estimator:
        estimator.step(batch([1, 2], times(OLD)))
        estimator.step(batch([3, 4], times(NOW)))
        assert there(estimator, 1, 2, 3, 4) == [True] * 4
        assert estimator.client.evict(["user"]) == {"user": 2}
        assert there(estimator, 1, 2, 3, 4) == [False, False, True, True]


def test_without_times_rows_are_as_old_as_their_steps():
    class Untimed(Timed):
        request_time = ""

    with job(Untimed()) as estimator:
        estimator.step(batch([1], [OLD]))
        assert estimator.client.evict(["user"]) == {"user": 0}


def test_accumulated_batches_are_as_new_as_the_newest_and_the_next_step_begins_anew():
    with job(accumulate=2, async_push=2) as estimator:
        estimator.step(batch([1], [NOW]))
        estimator.step(batch([2], [OLD]))
        estimator.step(batch([3], [OLD]))
        estimator.step(batch([4], [OLD - 5]))
        estimator.optimization.drain()
        assert estimator.client.evict(["user"]) == {"user": 2}
        assert there(estimator, 1, 2, 3, 4) == [True, True, False, False]


def test_times_are_needed_in_training_alone():
    untimed = {"user": [1], "click": [1.0]}
    with job() as estimator:
        with pytest.raises(InvalidRequestError, match="a batch has no 'when', by which its rows are to expire"):
            estimator.step(untimed)
        assert "loss" in estimator.evaluate([untimed])
        with pytest.raises(InvalidRequestError, match=r"when\[0\]=\d+ is .* days ahead of this machine's clock"):
            estimator.step(batch([1], [NOW + 5 * DAY]))


def test_times_of_records_are_those_of_their_line_ids_or_columns():
    class Logged(Timed):
        request_time = "req_time"

    example = Example(line_id={"req_time": OLD}, label=[1.0])
    example.named_feature.add(name="user").feature.fid_v2_list.value.append(5)
    rows = from_arrow(pa.table({"user": [6], "click": [1.0], "req_time": [OLD]}))
    for data in (from_records([example.SerializeToString()], "example"), rows):
        with job(Logged()) as estimator:
            estimator.train(data.batch(1))
            assert estimator.client.evict(["user"]) == {"user": 1}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"occurrence_threshold": 2}, TableConfig.SLIDING),
        ({"occurrence_threshold": 2, "filter": "sliding", "filter_capacity": 1000}, TableConfig.SLIDING),
        ({"occurrence_threshold": 2, "filter": "probabilistic"}, TableConfig.PROBABILISTIC),
        ({"occurrence_threshold": 2, "filter": "probabilistic_equal"}, TableConfig.PROBABILISTIC_EQUAL),
    ],
)
def test_every_filter_reaches_the_table_of_a_feature(options, kind):
    class Rare(Task):
        user = Embedding(dim=2, **options)
        labels: ClassVar = {"click": Label()}

        def forward(self, x):
            return x.user.vector.sum(1)

    with job(Rare()) as estimator:
        estimator.open()
        (table,) = estimator.client.describe()[0].tables
        assert table.filter == kind
        for _ in range(40):
            estimator.step({"user": [1], "click": [1.0]})
        estimator.step({"user": [2], "click": [1.0]})
        assert there(estimator, 1) == [True]
        if kind == TableConfig.SLIDING:
            assert there(estimator, 2) == [False]


def test_options_of_a_feature_are_those_of_its_table():
    class Own(Task):
        user = Embedding(
            dim=3,
            bias=True,
            optimizer=Sgd(learning_rate=1.0),
            initializer=Constants(0.5),
            bias_initializer=Zeros(),
            ttl_days=3,
            evict_every_hours=6,
            initial_capacity=5_000,
            seed=7,
            table="people",
        )
        same = user.view(pooling="sum")
        labels: ClassVar = {"click": Label()}

        def forward(self, x):
            return x.user.vector.sum(1) + x.same.bias

    with job(Own()) as estimator:
        estimator.step({"user": [1], "same": [[2]], "click": [1.0]})
        (table,) = estimator.client.describe()[0].tables
        assert (table.name, table.seed) == ("people", 7)
        assert table.hash_table.enable_feature_eviction
        assert table.hash_table.feature_evict_every_n_hours == 6
        assert table.hash_table.slot_expire_time_config.default_expire_time == 3
        row = estimator.client.table("people").lookup([1])[0]
        assert row[0] == 0.0
        assert (row[1:] != 0.5).all()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"dim": 4}, "dim=2 and 4"),
        ({"dim": 2, "ttl_days": 5}, "ttl_days=None and 5"),
        ({"dim": 2, "optimizer": Adagrad(learning_rate=0.5)}, "optimizer=None and Adagrad"),
        ({"dim": 2, "bias": True, "occurrence_threshold": 1}, "bias=False and True, occurrence_threshold=None and 1"),
    ],
)
def test_features_of_one_table_with_other_options_are_refused(other, said):
    class Two(Task):
        one = Embedding(dim=2, table="shared")
        two = Embedding(table="shared", **other)
        labels: ClassVar = {"click": Label()}

        def forward(self, x):
            return x.one.vector.sum(1) + x.two.vector.sum(1)

    with pytest.raises(InvalidRequestError) as error, job(Two()) as estimator:
        estimator.open()
    assert f"features 'one' and 'two' are of one table, 'shared', with {said}" in str(error.value)
    assert "two = one.view()" in str(error.value)


def test_features_of_one_table_with_the_same_options_share_its_rows():
    class Two(Task):
        one = Embedding(dim=2, table="shared")
        two = Embedding(dim=2, table="shared", optimizer=Adagrad(learning_rate=0.05))
        labels: ClassVar = {"click": Label()}

        def forward(self, x):
            return x.one.vector.sum(1) + x.two.vector.sum(1)

    with job(Two()) as estimator:
        estimator.step({"one": [1], "two": [2], "click": [1.0]})
        assert estimator.client.table("shared").size() == 2
