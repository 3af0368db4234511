"""Wrappers of optimizers, initializers and compressors: their exact bytes, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith import tables
from trilith.errors import InvalidRequestError
from trilith.tables import (
    Adadelta,
    Adagrad,
    Adam,
    Amsgrad,
    BatchSoftmax,
    BatchSoftmaxInitializer,
    Constants,
    DynamicWdAdagrad,
    FixedR8,
    Fp16,
    Fp32,
    Ftrl,
    GroupAdagrad,
    GroupFtrl,
    Momentum,
    MovingAverage,
    OneBit,
    Ones,
    PolynomialDecay,
    RandomUniform,
    Rmsprop,
    RmspropV2,
    Sgd,
    StochasticRoundingFloat16,
    Zeros,
)
from trilith.tables.parts import Part
from trilith.tables.ranges import RANGES
from trilith_proto.hash_table_pb2 import FloatCompressorConfig, InitializerConfig, OptimizerConfig

# Written by hand from the field numbers: tag, length, then each field that has a value, in the order of its number.
F_0 = "00000000"
F_09 = "6666663f"
F_099 = "a4707d3f"
F_0999 = "77be7f3f"
F_1 = "0000803f"
F_001 = "0ad7233c"
F_0001 = "6f12833a"
F_1E6 = "bd378635"
F_1E8 = "77cc2b32"
BYTES = {
    Sgd(): f"1205 15{F_0001}",
    Sgd(learning_rate=1.0): f"1205 15{F_1}",
    Adagrad(): f"0a0e 15{F_001} 2001 2d{F_0} 3000",
    Adagrad(learning_rate=0.01, initial_accumulator_value=1.0, warmup_steps=300): (
        f"0a14 15{F_001} 1d{F_1} 2001 2d{F_0} 30ac02"
    ),
    Adadelta(): f"3216 15{F_1} 1d{F_0} 25{F_09} 2d{F_1E6} 3800",
    Adam(): f"3a1f 15{F_0001} 1d{F_09} 25{F_0999} 2800 35{F_0} 3800 45{F_1E8} 4800",
    Adam(use_nesterov=True): f"3a1f 15{F_0001} 1d{F_09} 25{F_0999} 2800 35{F_0} 3801 45{F_1E8} 4800",
    Amsgrad(): f"421d 15{F_0001} 1d{F_09} 25{F_0999} 35{F_0} 3800 45{F_1E8} 4800",
    BatchSoftmax(): "7a00",
    Momentum(): f"4a13 15{F_0001} 1d{F_0} 2000 2d{F_09} 3000",
    MovingAverage(): f"5205 15{F_09}",
    Rmsprop(): f"5a0a 1d{F_0} 25{F_099}",
    RmspropV2(): f"620a 1d{F_0} 25{F_09}",
    Ftrl(): "1a02 3800",
    Ftrl(beta=1.0, l1_regularization=1.0, l2_regularization=0.0): f"1a11 1d{F_1} 2d{F_1} 35{F_0} 3800",
    GroupFtrl(): "7202 3800",
    GroupAdagrad(): f"820107 35{F_0} 3800",
    GroupAdagrad(l2_regularization=1.0): f"82010c 2d{F_1} 35{F_0} 3800",
    DynamicWdAdagrad(): f"2a19 15{F_001} 2001 2d{F_0} 3000 3801 4000 4d{F_1} 5000",
    # The flag is field 4: between sgd (2) and adam (7).
    StochasticRoundingFloat16(Sgd()): f"1205 15{F_0001} 2001",
    StochasticRoundingFloat16(BatchSoftmax()): "2001 7a00",
    Zeros(): "0a00",
    RandomUniform(): "1200",
    RandomUniform(0.0, 1.0): f"120a 15{F_0} 1d{F_1}",
    Ones(): "1a00",
    Constants(1.0): f"7a05 15{F_1}",
    BatchSoftmaxInitializer(1): f"7a05 15{F_1}",
    Fp32(): "0a00",
    Fp16(): "1200",
    FixedR8(): f"1a05 15{F_1}",
    OneBit(): "2208 10c801 2dcdcc4c3d",
}
OPTIMIZERS = [Sgd, Adagrad, Adadelta, Adam, Amsgrad, Momentum, Rmsprop, RmspropV2, Ftrl, GroupFtrl, GroupAdagrad]


@pytest.mark.parametrize(("part", "expected"), BYTES.items(), ids=str)
def test_a_wrapper_writes_exactly_its_set_attributes(part, expected):
    assert part.as_proto().SerializeToString(deterministic=True) == bytes.fromhex(expected)


def test_every_public_wrapper_has_its_bytes_held():
    public = {each for each in vars(tables).values() if isinstance(each, type) and issubclass(each, Part)}
    bases = {tables.Optimizer, tables.Initializer, tables.Compressor}
    assert public - bases == {type(each) for each in BYTES}


@pytest.mark.parametrize("config", [OptimizerConfig, InitializerConfig, FloatCompressorConfig])
def test_every_number_of_every_kind_has_a_range(config):
    for kind in config.DESCRIPTOR.oneofs_by_name["type"].fields:
        for field in kind.message_type.fields:
            if field.name != "dim_size" and field.type != field.TYPE_BOOL:
                assert field.name in RANGES, f"{kind.name}.{field.name}"


@pytest.mark.parametrize("part", BYTES, ids=str)
def test_wrappers_are_frozen_and_compare_by_value(part):
    again = type(part)(**{each.name: getattr(part, each.name) for each in fields(part)})
    assert again == part
    assert hash(again) == hash(part)
    for each in fields(part):
        with pytest.raises(FrozenInstanceError):
            setattr(part, each.name, None)


@given(rate=st.floats(0, 2.0**100, width=32), decay=st.floats(0, 2.0**100, width=32), warmup=st.integers(0, 2**63 - 1))
def test_values_in_range_arrive_in_the_message(rate, decay, warmup):
    got = Adagrad(learning_rate=rate, weight_decay_factor=decay, warmup_steps=warmup).as_proto().adagrad
    assert (got.learning_rate, got.weight_decay_factor, got.warmup_steps) == (rate, decay, warmup)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf, 1e39, "0.1", True, np.float32("nan")])
def test_a_learning_rate_that_is_no_finite_number_of_at_least_0_is_refused(optimizer, rate):
    with pytest.raises(InvalidRequestError, match=rf"{optimizer.__name__}: learning_rate="):
        optimizer(learning_rate=rate)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adam(beta1=1.0), r"Adam: beta1=1\.0 is outside \[0, 1\)"),
        (lambda: Adam(use_nesterov=1), "Adam: use_nesterov=1 is not a bool"),
        (lambda: Adam(warmup_steps=-1), "Adam: warmup_steps=-1 is outside 0"),
        (lambda: Adam(warmup_steps=1.5), "Adam: warmup_steps=1.5 is not an integer"),
        (lambda: Adagrad(hessian_compression_times=0), r"hessian_compression_times=0 is outside 1\.\.2147483647"),
        (lambda: Momentum(momentum=1.5), r"Momentum: momentum=1\.5 is outside \[0, 1\]"),
        (lambda: Ftrl(l1_regularization=-1.0), r"Ftrl: l1_regularization=-1\.0 is not a finite float32 of at least 0"),
        (lambda: Adagrad(learning_rate=PolynomialDecay(0.1, 5)), "a schedule is given to the table"),
        (lambda: RandomUniform(1.0, 0.0), "RandomUniform: minval=1 is above maxval=0"),
        (lambda: RandomUniform(0.06), r"minval=0\.06 is above maxval=0\.05"),
        (lambda: Constants(math.nan), "Constants: constant=nan is not a finite float32"),
        (lambda: BatchSoftmaxInitializer(0), "init_step_interval=0 is below 1"),
        (lambda: FixedR8(0.0), r"FixedR8: fixed_range=0\.0 is not a finite float32 above 0"),
        (lambda: OneBit(step_size=0), "OneBit: step_size=0 is outside 1"),
        (lambda: OneBit(amplitude=-1.0), r"OneBit: amplitude=-1\.0"),
        (lambda: StochasticRoundingFloat16(Zeros()), "is neither a OptimizerConfig nor a wrapper"),
        (lambda: StochasticRoundingFloat16(None), "None is neither"),
    ],
)
def test_what_a_part_cannot_be_is_refused_with_the_value_and_the_range(make, message):
    with pytest.raises(InvalidRequestError, match=message):
        make()


def test_a_numpy_number_is_a_number():
    assert Adagrad(learning_rate=np.float32(0.5), warmup_steps=np.int64(3)) == Adagrad(
        learning_rate=0.5, warmup_steps=3
    )


def test_stochastic_rounding_leaves_a_ready_message_as_it_was():
    inner = OptimizerConfig()
    inner.sgd.SetInParent()
    assert StochasticRoundingFloat16(inner).as_proto().stochastic_rounding_float16
    assert not inner.stochastic_rounding_float16
