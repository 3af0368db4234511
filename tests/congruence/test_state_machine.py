"""Random sequences of calls on a table equal the same calls on a dict."""

from __future__ import annotations

import secrets

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import trilith
from trilith.tables import RandomUniform, Sgd

DIM = 3
CONFIG = {"dim": DIM, "optimizer": Sgd(learning_rate=0.5), "initializer": RandomUniform(-1, 1), "seed": 11}
POOL = [0, 1, 2, 3, 4, 5, 2**63, 2**64 - 1, 2**64 - 2]

IDS = st.lists(st.sampled_from(POOL), max_size=12)
VALUES = st.integers(0, 2**32 - 1)


def rows_from(seed, n):
    # Quarters add and subtract exactly, so the order of sums is not what is tested here.
    return (np.random.default_rng(seed).integers(-64, 64, (n, DIM)) / 4).astype(np.float32)


class TableMachine(RuleBasedStateMachine):
    """One table of `client` beside a dict of rows; initial rows come from an embedded table of the same seed."""

    client = None
    initial = None

    @initialize()
    def begin(self):
        self.table = self.client.table(f"t{secrets.token_hex(6)}", **CONFIG)
        self.rows = {}

    def start(self, each):
        return self.rows.setdefault(each, self.initial[each].copy())

    @rule(ids=IDS, seed=VALUES)
    def apply_gradients(self, ids, seed):
        grads = rows_from(seed, len(ids))
        self.table.apply_gradients(np.array(ids, np.uint64), grads)
        for each in dict.fromkeys(ids):
            total = sum(grads[i] for i, other in enumerate(ids) if other == each)
            self.rows[each] = self.start(each) - np.float32(0.5) * total

    @rule(ids=IDS, seed=VALUES)
    def assign(self, ids, seed):
        values = rows_from(seed, len(ids))
        self.table.assign(np.array(ids, np.uint64), values)
        self.rows.update(zip(ids, values, strict=True))

    @rule(ids=IDS, seed=VALUES)
    def assign_add(self, ids, seed):
        values = rows_from(seed, len(ids))
        self.table.assign_add(np.array(ids, np.uint64), values)
        for each, value in zip(ids, values, strict=True):
            self.rows[each] = self.start(each) + value

    @rule(ids=IDS)
    def reinitialize(self, ids):
        want = []
        for each in ids:
            want.append(int(each in self.rows))
            self.rows[each] = self.initial[each].copy()
        assert self.table.reinitialize(np.array(ids, np.uint64)).tolist() == want

    @rule(ids=IDS)
    def erase(self, ids):
        gone = {each for each in ids if self.rows.pop(each, None) is not None}
        assert self.table.erase(np.array(ids, np.uint64)) == len(gone)

    @rule(ids=IDS)
    def lookup(self, ids):
        want = [self.rows.get(each, np.zeros(DIM)) for each in ids]
        got = self.table.lookup(np.array(ids, np.uint64))
        np.testing.assert_allclose(got, np.array(want).reshape(-1, DIM), rtol=1e-6, atol=1e-6)

    @rule(ids=IDS)
    def contains(self, ids):
        assert self.table.contains(np.array(ids, np.uint64)).tolist() == [each in self.rows for each in ids]

    @rule()
    def clear(self):
        assert self.table.clear() == len(self.rows)
        self.rows.clear()

    @invariant()
    def the_table_has_as_many_rows(self):
        if hasattr(self, "table"):
            assert self.table.size() == len(self.rows)

    def teardown(self):
        if hasattr(self, "table"):
            got = self.table.lookup(np.array(POOL, np.uint64))
            want = np.array([self.rows.get(each, np.zeros(DIM)) for each in POOL])
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
            self.table.clear()


def test_a_table_is_a_dict(client):
    with trilith.connect("local://", threads=1) as embedded:
        fresh = embedded.table("initial", **CONFIG)
        ids = np.array(POOL, np.uint64)
        fresh.reinitialize(ids)
        initial = dict(zip(POOL, fresh.lookup(ids), strict=True))

    class Machine(TableMachine):
        pass

    Machine.client, Machine.initial = client, initial
    run_state_machine_as_test(Machine, settings=settings(max_examples=30, stateful_step_count=25))
