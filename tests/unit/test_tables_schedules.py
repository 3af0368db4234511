"""Learning rates over steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith.errors import InvalidRequestError
from trilith.tables import LearningRateFunction, PolynomialDecay
from trilith.tables.schedules import rate_at, rate_text, rates_at


class Halving(LearningRateFunction):
    """Halves at every step."""

    def __init__(self, start: float, name: str | None = None) -> None:
        self.start = start
        self.name = name

    def __call__(self, step: int) -> float:
        return self.start / 2**step


def formula(initial, end, decay_steps, power, cycle, step):
    """The definition: rate = (I - E) * (1 - s'/K')^power + E."""
    length = decay_steps * max(1, math.ceil(step / decay_steps)) if cycle else decay_steps
    done = step if cycle else min(step, decay_steps)
    return (initial - end) * (1 - done / length) ** power + end


@given(
    initial=st.floats(0, 10),
    end=st.floats(0, 10),
    decay_steps=st.integers(1, 1000),
    power=st.sampled_from([0.5, 1.0, 2.0]),
    cycle=st.booleans(),
    step=st.integers(0, 5000),
)
def test_polynomial_decay_follows_its_formula(initial, end, decay_steps, power, cycle, step):
    schedule = PolynomialDecay(initial, decay_steps, end_learning_rate=end, power=power, cycle=cycle)
    assert schedule(step) == pytest.approx(formula(initial, end, decay_steps, power, cycle, step), abs=1e-12)


def test_the_end_may_be_the_larger_rate():
    schedule = PolynomialDecay(0.01, 10, end_learning_rate=0.11)
    assert [schedule(step) for step in (1, 2, 10, 11)] == pytest.approx([0.02, 0.03, 0.11, 0.11])


def test_a_cycle_stretches_to_the_next_multiple():
    schedule = PolynomialDecay(1.0, 10, end_learning_rate=0.0, cycle=True)
    assert [schedule(step) for step in (0, 10, 15, 20, 25)] == pytest.approx([1.0, 0.0, 0.25, 0.0, 1 - 25 / 30])


def test_the_default_end_is_a_ten_thousandth():
    assert PolynomialDecay(0.1, 5)(5) == 0.0001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay_steps": 0}, "decay_steps=0 is below 1"),
        ({"decay_steps": math.nan}, "decay_steps=nan"),
        ({"initial_learning_rate": -1.0}, r"initial_learning_rate=-1\.0"),
        ({"end_learning_rate": math.inf}, "end_learning_rate=inf"),
        ({"power": -1.0}, r"power=-1\.0"),
    ],
)
def test_a_schedule_without_meaning_is_refused(arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        PolynomialDecay(**{"initial_learning_rate": 0.1, "decay_steps": 10, **arguments})


def test_a_step_before_the_first_is_refused():
    with pytest.raises(InvalidRequestError, match="step=-1 is below 0"):
        PolynomialDecay(0.1, 5)(-1)


def test_a_schedule_must_say_how_it_is_called():
    with pytest.raises(TypeError):
        LearningRateFunction()


def test_rates_are_numbers_schedules_and_functions_without_arguments():
    rates = (0.5, Halving(1.0), lambda: 0.125, np.float32(2.0), 3)
    got = rates_at(rates, 2)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array([0.5, 0.25, 0.125, 2.0, 3.0], np.float32))
    assert rate_at(Halving(1.0), 0) == 1.0


def test_a_schedules_text_is_its_class_and_sorted_attributes():
    assert rate_text(Halving(0.5, name="h")) == "Halving(name=h, start=0.5)"
    assert rate_text(PolynomialDecay(0.1, 5)) == (
        "PolynomialDecay(cycle=False, decay_steps=5, end_learning_rate=0.0001, "
        "initial_learning_rate=0.1, name=None, power=1.0)"
    )


def test_rates_are_the_same_by_value_and_functions_only_by_identity():
    assert rate_text(1) == rate_text(1.0) == rate_text(np.float32(1.0))
    assert rate_text(PolynomialDecay(0.1, 5)) == rate_text(PolynomialDecay(0.1, 5))
    assert rate_text(PolynomialDecay(0.1, 5)) != rate_text(PolynomialDecay(0.1, 6))
    one, other = (lambda: 0.1), (lambda: 0.1)
    assert rate_text(one) != rate_text(other)
