"""What a table is made of: optimizers, initializers, compressors, schedules, and the spec that puts them together."""

from trilith.tables.checks import check_table_config
from trilith.tables.compressors import Compressor, FixedR8, Fp16, Fp32, OneBit
from trilith.tables.config import CuckooHashTable, HashTableConfig, Segment, default_learning_rate, fuse_adjacent
from trilith.tables.initializers import (
    BatchSoftmaxInitializer,
    Constants,
    Initializer,
    Ones,
    RandomUniform,
    Zeros,
)
from trilith.tables.optimizers import (
    Adadelta,
    Adagrad,
    Adam,
    Amsgrad,
    BatchSoftmax,
    DynamicWdAdagrad,
    Ftrl,
    GroupAdagrad,
    GroupFtrl,
    Momentum,
    MovingAverage,
    Optimizer,
    Rmsprop,
    RmspropV2,
    Sgd,
    StochasticRoundingFloat16,
)
from trilith.tables.schedules import LearningRate, LearningRateFunction, PolynomialDecay
from trilith.tables.spec import TableSpec, table_config

__all__ = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "Amsgrad",
    "BatchSoftmax",
    "BatchSoftmaxInitializer",
    "Compressor",
    "Constants",
    "CuckooHashTable",
    "DynamicWdAdagrad",
    "FixedR8",
    "Fp16",
    "Fp32",
    "Ftrl",
    "GroupAdagrad",
    "GroupFtrl",
    "HashTableConfig",
    "Initializer",
    "LearningRate",
    "LearningRateFunction",
    "Momentum",
    "MovingAverage",
    "OneBit",
    "Ones",
    "Optimizer",
    "PolynomialDecay",
    "RandomUniform",
    "Rmsprop",
    "RmspropV2",
    "Segment",
    "Sgd",
    "StochasticRoundingFloat16",
    "TableSpec",
    "Zeros",
    "check_table_config",
    "default_learning_rate",
    "fuse_adjacent",
    "table_config",
]
