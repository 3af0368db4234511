"""Optimization: rows and dense parameters stepped together, as torch steps dense copies of the tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import trilith
from trilith.errors import InvalidRequestError, NonFiniteError
from trilith.nn import EmbeddingBag, EmbeddingCollection, Feature
from trilith.nn.dense import DenseOnPs
from trilith.nn.optimization import Optimization
from trilith.pipelining import Lane
from trilith.tables import Adagrad, PolynomialDecay, RandomUniform, Segment, Sgd, Zeros

DIM, VOCABULARY, BATCH = 4, 50, 16


class Twin(nn.Module):
    """The same model over dense copies of the tables."""

    def __init__(self, rows: dict[str, np.ndarray], head: nn.Module) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {
                name: nn.EmbeddingBag.from_pretrained(torch.from_numpy(each.copy()), mode="mean", freeze=False)
                for name, each in rows.items()
            }
        )
        self.head = head

    def forward(self, ids: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(torch.cat([table(ids[name]) for name, table in self.tables.items()], 1))[:, 0]


class Model(nn.Module):
    def __init__(self, client: trilith.Client, head: nn.Module) -> None:
        super().__init__()
        names = ("user", "item")
        tables = {
            name: client.table(
                name,
                dim=DIM,
                optimizer=Adagrad(learning_rate=0.1, initial_accumulator_value=0.1),
                initializer=RandomUniform(-1, 1),
            )
            for name in names
        }
        for table in tables.values():
            table.assign_add(np.arange(VOCABULARY), np.zeros((VOCABULARY, DIM), np.float32))
        self.embeddings = EmbeddingCollection(client, {name: Feature(table) for name, table in tables.items()})
        self.head = head

    def forward(self, ids: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(torch.cat(list(self.embeddings(ids).values()), 1))[:, 0]


def head(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2 * DIM, 8), nn.Tanh(), nn.Linear(8, 1))


def batches(count: int, seed: int = 0) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    rng = np.random.default_rng(seed)
    return [
        (
            {name: torch.from_numpy(rng.integers(0, VOCABULARY, (BATCH, 3))) for name in ("user", "item")},
            torch.from_numpy(rng.integers(0, 2, BATCH).astype(np.float32)),
        )
        for _ in range(count)
    ]


@pytest.fixture
def client():
    with trilith.connect("local://") as opened:
        yield opened


def pair(client: trilith.Client) -> tuple[Model, Twin, torch.optim.Optimizer]:
    model = Model(client, head())
    ids = np.arange(VOCABULARY)
    twin = Twin({name: client.table(name).lookup(ids) for name in ("user", "item")}, head())
    reference = torch.optim.Adagrad(twin.parameters(), lr=0.1, initial_accumulator_value=0.1, eps=0.0)
    return model, twin, reference


def check_equal(model: Model, twin: Twin, client: trilith.Client) -> None:
    for name, table in twin.tables.items():
        rows = client.table(name).lookup(np.arange(VOCABULARY))
        np.testing.assert_allclose(rows, table.weight.detach().numpy(), rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(model.head.parameters(), twin.head.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def dense_of(model: Model) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.head.parameters(), lr=0.1, initial_accumulator_value=0.1, eps=0.0)


def test_a_loop_with_scaler_overflow_accumulation_and_clipping_equals_plain_torch(client):
    model, twin, reference = pair(client)
    optimization = Optimization(model, dense_of(model))
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7) for _ in range(2)]
    loops = [
        (model, optimization, optimization.parameters_and_rows),
        (twin, reference, lambda: list(twin.parameters())),
    ]
    for step in range(20):
        micro = batches(4, seed=step)
        for (module, optimizer, parameters), scaler in zip(loops, scalers, strict=True):
            for ids, labels in micro:
                loss = functional.binary_cross_entropy_with_logits(module(ids), labels) / len(micro)
                if step == 11:
                    loss = loss * float("inf")  # an overflow
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    check_equal(model, twin, client)


def test_nothing_is_sent_before_step_and_nothing_after_zero_grad(client):
    model, *_ = pair(client)
    optimization = Optimization(model, dense_of(model))
    before = client.table("user").lookup(np.arange(VOCABULARY))
    ids, labels = batches(1)[0]
    functional.binary_cross_entropy_with_logits(model(ids), labels).backward()
    np.testing.assert_array_equal(client.table("user").lookup(np.arange(VOCABULARY)), before)
    optimization.zero_grad()
    optimization.step()
    np.testing.assert_array_equal(client.table("user").lookup(np.arange(VOCABULARY)), before)


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted_or_refused(client):
    model, *_ = pair(client)
    optimization = Optimization(model, dense_of(model), skip_non_finite=True)
    before = client.table("user").lookup(np.arange(VOCABULARY))
    ids, labels = batches(1)[0]
    (functional.binary_cross_entropy_with_logits(model(ids), labels) * float("nan")).backward()
    optimization.step()
    assert optimization.skipped == 1
    np.testing.assert_array_equal(client.table("user").lookup(np.arange(VOCABULARY)), before)
    optimization.close()

    strict = Optimization(model, dense_of(model))
    weights = [each.detach().clone() for each in model.head.parameters()]
    (functional.binary_cross_entropy_with_logits(model(ids), labels) * float("nan")).backward()
    with pytest.raises(NonFiniteError):
        strict.step()
    for mine, was in zip(model.head.parameters(), weights, strict=True):
        torch.testing.assert_close(mine, was)


def test_occurrences_count_once_for_each_place_of_an_id_also_after_clipping(client):
    table = client.table("rare", dim=2, optimizer=Sgd(learning_rate=1.0), occurrence_threshold=3)
    model = EmbeddingBag(table, combiner="sum")
    optimization = Optimization(model)
    for ids in ([[7, 7], [7, 7]], [[7, 7], [7, 7]]):  # one by one there would be too few
        model(torch.tensor(ids)).sum().backward()
        torch.nn.utils.clip_grad_norm_(optimization.parameters_and_rows(), 1.0)
        optimization.step()
    assert table.contains([7]).tolist() == [True]


def test_rows_are_stepped_by_the_mean_over_ranks_where_each_has_its_share(client):
    table = client.table("shared", dim=2, optimizer=Sgd(learning_rate=1.0))
    model = EmbeddingBag(table, combiner="sum")
    optimization = Optimization(model, row_scale=0.25)
    model(torch.tensor([[1]])).sum().backward()
    optimization.step()
    created = client.table("shared").lookup([1])
    model(torch.tensor([[1]])).sum().backward()
    optimization.step()
    np.testing.assert_allclose(created - client.table("shared").lookup([1]), [[0.25, 0.25]], rtol=1e-6)


def test_a_module_has_one_optimization_at_a_time_and_steps_by_itself_again_afterwards(client):
    table = client.table("again", dim=2, optimizer=Sgd(learning_rate=1.0))
    model = EmbeddingBag(table, combiner="sum")
    first = Optimization(model)
    with pytest.raises(InvalidRequestError, match="Optimization"):
        Optimization(model)
    first.close()
    model(torch.tensor([[1]])).sum().backward()
    assert table.contains([1]).tolist() == [True]


def test_a_model_with_nothing_to_learn_and_a_scale_that_is_none_are_refused(client):
    with pytest.raises(InvalidRequestError, match="nothing learns"):
        Optimization(nn.Linear(1, 1))
    with pytest.raises(InvalidRequestError, match="row_scale=0"):
        Optimization(EmbeddingBag(client.table("t", dim=2)), row_scale=0)


RISING = PolynomialDecay(0.0, 100, end_learning_rate=1.0)
"""A rate of a hundredth of the step."""


def counted(client: trilith.Client, name: str, **options) -> EmbeddingCollection:
    table = client.table(name, dim=2, optimizer=Sgd(), initializer=Zeros(), learning_rate=RISING)
    return EmbeddingCollection(client, {"f": Feature(table, "sum")}, **options)


def test_each_step_that_is_taken_is_counted_and_schedules_of_tables_follow(client):
    model = counted(client, "counted")
    optimization = Optimization(model, skip_non_finite=True)
    for number in range(8):
        for _ in range(2):  # several batches are one step
            factor = float("nan") if number == 5 else 1.0
            (factor * model({"f": torch.tensor([[1]])})["f"].sum()).backward()
        optimization.step()
        optimization.zero_grad()
    assert client.known_step == client.global_step() == 7
    assert optimization.skipped == 1
    np.testing.assert_allclose(client.table("counted").lookup([1]), [[-0.42, -0.42]], rtol=1e-6)


@pytest.mark.parametrize("lane", [Lane, lambda: None])
def test_steps_on_their_way_are_counted_in_their_order(client, lane):
    lane = lane()
    model = counted(client, "behind", async_push=2, lane=lane)
    optimization = Optimization(model)
    for _ in range(20):
        model({"f": torch.tensor([[1]])})["f"].sum().backward()
        optimization.step()
    optimization.drain()
    assert client.known_step == client.global_step() == 20
    np.testing.assert_allclose(client.table("behind").lookup([1]), [[-1.9, -1.9]], rtol=1e-6)
    optimization.close()
    model.close()
    if lane is not None:
        lane.close()


def test_a_step_of_several_modules_and_of_dense_parameters_on_the_ps_is_counted_once(client):
    model = nn.ModuleList([counted(client, "one"), counted(client, "two"), nn.Linear(2, 1)])
    dense = DenseOnPs(client, model, Sgd(learning_rate=0.1))
    optimization = Optimization(model, dense)
    for number in range(4):
        dense.pull()
        vector = sum(each({"f": torch.tensor([[1]])})["f"] for each in model[:2])
        loss = vector.sum() if number == 2 else model[2](vector).sum() + vector.sum()
        loss.backward()
        optimization.step()
    assert client.known_step == client.global_step() == 4
    dense.close()


def test_a_step_in_which_nothing_was_looked_up_is_counted_too(client):
    model = nn.ModuleList([counted(client, "unused"), nn.Linear(2, 1)])
    optimization = Optimization(model, torch.optim.SGD(model[1].parameters(), lr=0.1))
    model[1](torch.ones(1, 2)).sum().backward()
    optimization.step()
    assert client.known_step == client.global_step() == 1


# ---- rates -----------------------------------------------------------------------------------------------------------


def warm_up(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2, 0.3], total_steps=12, cycle_momentum=False)


def rising_then_falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
    ]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [5])


def on_a_plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.3)


RATES = {"user": 0.1, "item": 0.02}


class Rated(nn.Module):
    """Tables with rates of their own, by the optimizers of `trilith.tables` that torch has too."""

    def __init__(self, client: trilith.Client, kind: str, prefix: str) -> None:
        super().__init__()
        made = {"adagrad": lambda rate: Adagrad(learning_rate=rate), "sgd": lambda rate: Sgd(learning_rate=rate)}[kind]
        self.tables = {
            name: client.table(prefix + name, dim=DIM, optimizer=made(rate), initializer=RandomUniform(-1, 1))
            for name, rate in RATES.items()
        }
        for table in self.tables.values():
            table.assign_add(np.arange(VOCABULARY), np.zeros((VOCABULARY, DIM), np.float32))
        self.embeddings = EmbeddingCollection(client, {name: Feature(table) for name, table in self.tables.items()})
        self.head = head()

    def forward(self, ids: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(torch.cat(list(self.embeddings(ids).values()), 1))[:, 0]


def torch_optimizer(kind: str, groups: list[dict]) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(groups)
    return torch.optim.Adagrad(groups, initial_accumulator_value=0.1, eps=0.0)


@pytest.mark.parametrize("where", ["here", "ps"])
@pytest.mark.parametrize("kind", ["adagrad", "sgd"])
@pytest.mark.parametrize("schedule", [warm_up, one_cycle, rising_then_falling, on_a_plateau])
def test_schedulers_change_the_rates_of_rows_and_dense_parameters_as_they_do_in_plain_torch(
    client, schedule, kind, where
):
    model = Rated(client, kind, f"{schedule.__name__}_{kind}_{where}_")
    twin = Twin({name: table.lookup(np.arange(VOCABULARY)) for name, table in model.tables.items()}, head())
    dense = {"adagrad": Adagrad(learning_rate=0.05), "sgd": Sgd(learning_rate=0.05)}[kind]
    on_ps = DenseOnPs(client, model.head, dense, prefix=f"{schedule.__name__}_{kind}/") if where == "ps" else None
    mine = on_ps or torch_optimizer(kind, [{"params": model.head.parameters(), "lr": 0.05}])
    optimization = Optimization(model, mine)
    tables = [{"params": table.parameters(), "lr": RATES[name]} for name, table in twin.tables.items()]
    reference = torch_optimizer(kind, [{"params": twin.head.parameters(), "lr": 0.05}, *tables])
    assert [group["lr"] for group in optimization.param_groups] == [0.05, 0.1, 0.02]
    schedules = [schedule(optimization), schedule(reference)]
    for ids, labels in batches(12):
        for (module, optimizer), each in zip(((model, optimization), (twin, reference)), schedules, strict=True):
            optimization.pull()
            loss = functional.binary_cross_entropy_with_logits(module(ids), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            each.step(*([loss.item()] if schedule is on_a_plateau else []))
        theirs = [group["lr"] for group in reference.param_groups]
        assert [group["lr"] for group in optimization.param_groups] == pytest.approx(theirs)
    optimization.pull()
    assert list(optimization.rates()) == [
        "dense" if where == "ps" else "0",
        *(each.name for each in model.tables.values()),
    ]
    for name, table in twin.tables.items():
        rows = model.tables[name].lookup(np.arange(VOCABULARY))
        np.testing.assert_allclose(rows, table.weight.detach().numpy(), rtol=1e-6, atol=1e-6)
    for ours, plain in zip(model.head.parameters(), twin.head.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_a_factor_multiplies_a_schedule_of_the_table_and_each_segment_with_a_rate_of_its_own(client):
    segments = [
        Segment(1, Zeros(), Sgd(learning_rate=0.5)),
        Segment(2, Zeros(), Sgd(learning_rate=0.25)),
    ]
    two = client.table("two", segments=segments)
    scheduled = client.table("scheduled", dim=1, optimizer=Sgd(), initializer=Zeros(), learning_rate=RISING)
    model = EmbeddingCollection(client, {"two": Feature(two, "sum"), "scheduled": Feature(scheduled, "sum")})
    optimization = Optimization(model)
    client.global_step(set_to=10)
    assert [group["lr"] for group in optimization.param_groups] == [1.0, 1.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimization, lambda step: 0.5)
    sum(each.sum() for each in model({"two": [[1]], "scheduled": [[1]]}).values()).backward()
    optimization.step()
    scheduler.step()
    np.testing.assert_allclose(two.lookup([1]), [[-0.25, -0.125, -0.125]], rtol=1e-6)
    np.testing.assert_allclose(scheduled.lookup([1]), [[-0.05]], rtol=1e-6)


def test_rates_that_nobody_changes_are_not_sent_and_those_of_another_clients_table_can_be_changed(client):
    client.table("theirs", dim=1, optimizer=Sgd(learning_rate=0.5), initializer=Zeros())
    client._tables.clear()  # as a client that has not made it
    model = EmbeddingCollection(client, {"f": Feature(client.table("theirs"), "sum")})
    sent = []
    apply = client._cluster.shards[0].apply_gradients

    def noted(parts, write):
        sent.extend(None if part.learning_rates is None else part.learning_rates.tolist() for part in parts)
        return apply(parts, write)

    client._cluster.shards[0].apply_gradients = noted
    optimization = Optimization(model)
    for rate in (0.5, 0.1):
        optimization.param_groups[0]["lr"] = rate
        model({"f": [[1]]})["f"].sum().backward()
        optimization.step()
    assert sent == [None, [np.float32(0.1)]]
    np.testing.assert_allclose(client.table("theirs").lookup([1]), [[-0.6]], rtol=1e-6)


def test_a_rate_that_is_none_is_refused_before_anything_is_sent(client):
    table = client.table("odd", dim=1, optimizer=Sgd(learning_rate=0.5), initializer=Zeros())
    model = EmbeddingCollection(client, {"f": Feature(table, "sum")})
    optimization = Optimization(model)
    for rate in (-0.1, float("nan"), float("inf")):
        optimization.param_groups[0]["lr"] = rate
        model({"f": [[1]]})["f"].sum().backward()
        with pytest.raises(InvalidRequestError, match=r"rate_factors\['odd'\]"):
            optimization.step()
    assert not table.contains([1]).any()
    assert client.global_step() == 0


def test_a_loop_that_is_saved_goes_on_with_the_rates_it_had(client):
    def loop() -> tuple[Optimization, torch.optim.lr_scheduler.LRScheduler]:
        model = Rated(client, "sgd", "saved_")
        optimization = Optimization(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
        return optimization, torch.optim.lr_scheduler.MultiplicativeLR(optimization, lambda step: 0.5)

    def steps(optimization: Optimization, scheduler: torch.optim.lr_scheduler.LRScheduler, count: int) -> list[float]:
        for _ in range(count):
            optimization.step()
            scheduler.step()
        return list(optimization.rates().values())

    straight = steps(*loop(), 5)
    optimization, scheduler = loop()
    steps(optimization, scheduler, 3)
    state = [optimization.state_dict(), scheduler.state_dict()]
    optimization, scheduler = loop()
    optimization.load_state_dict(state[0])
    scheduler.load_state_dict(state[1])
    assert steps(optimization, scheduler, 2) == straight
