"""Optimizers: what a table does with a gradient.

Formulas, defaults and their sources are in docs/optimizers.md. Defaults are those of `torch.optim` where it has the
optimizer, else those of the paper or system it comes from. What is None is left to the message, whose own defaults are
the reference system's. A learning rate here only seeds the table's own (see `trilith.tables.table_config`), except
`Rmsprop`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from trilith.tables.parts import Part, part_proto
from trilith_proto.hash_table_pb2 import OptimizerConfig

__all__ = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "Amsgrad",
    "BatchSoftmax",
    "DynamicWdAdagrad",
    "Ftrl",
    "GroupAdagrad",
    "GroupFtrl",
    "Momentum",
    "MovingAverage",
    "Optimizer",
    "OptimizerLike",
    "Rmsprop",
    "RmspropV2",
    "Sgd",
    "StochasticRoundingFloat16",
]


class Optimizer(Part[OptimizerConfig]):
    """Base of the optimizers."""

    __slots__ = ()
    config = OptimizerConfig


OptimizerLike: TypeAlias = Optimizer | OptimizerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd(Optimizer):
    """Plain gradient descent, no state."""

    kind = "sgd"
    learning_rate: float | None = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Adagrad(Optimizer):
    """Adagrad without epsilon; `initial_accumulator_value` keeps the first steps finite, as in TensorFlow."""

    kind = "adagrad"
    learning_rate: float | None = 0.01
    initial_accumulator_value: float | None = None
    hessian_compression_times: int = 1
    warmup_steps: int = 0
    weight_decay_factor: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Adadelta(Optimizer):
    """Adadelta; `averaging_ratio` is what torch calls rho."""

    kind = "adadelta"
    learning_rate: float | None = 1.0
    weight_decay_factor: float = 0.0
    averaging_ratio: float = 0.9
    epsilon: float = 1e-6
    warmup_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam(Optimizer):
    """Adam whose bias-correction powers are kept per row, so a rare row keeps its large corrections."""

    kind = "adam"
    learning_rate: float | None = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    use_beta1_warmup: bool = False
    weight_decay_factor: float = 0.0
    use_nesterov: bool = False
    epsilon: float = 1e-8
    warmup_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Amsgrad(Optimizer):
    """Adam that divides by the largest second moment so far."""

    kind = "amsgrad"
    learning_rate: float | None = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay_factor: float = 0.0
    use_nesterov: bool = False
    epsilon: float = 1e-8
    warmup_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSoftmax(Optimizer):
    """Not a gradient step: averages the number of steps between an id's occurrences. One float per row."""

    kind = "batch_softmax"
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Momentum(Optimizer):
    """Gradient descent with momentum."""

    kind = "momentum"
    learning_rate: float | None = 0.001
    weight_decay_factor: float = 0.0
    use_nesterov: bool = False
    momentum: float = 0.9
    warmup_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MovingAverage(Optimizer):
    """Not a gradient step: the "gradient" is a value to average into the weights."""

    kind = "moving_average"
    momentum: float = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Rmsprop(Optimizer):
    """RMSprop that always steps by its own `learning_rate`: schedules and rates given to the table have no effect.

    `momentum` is what torch calls alpha; 1 is added to the root instead of a small epsilon.
    """

    kind = "rmsprop"
    learning_rate: float | None = None
    weight_decay_factor: float = 0.0
    momentum: float = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class RmspropV2(Optimizer):
    """RMSprop that adds the squared gradient whole, and steps by the table's rate."""

    kind = "rmspropv2"
    learning_rate: float | None = None
    weight_decay_factor: float = 0.0
    momentum: float = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Ftrl(Optimizer):
    """FTRL-proximal with the reference system's one-sided l1 term: a positive z is not shrunk by it."""

    kind = "ftrl"
    renamed: ClassVar[dict[str, str]] = {
        "l1_regularization": "l1_regularization_strength",
        "l2_regularization": "l2_regularization_strength",
    }
    learning_rate: float | None = None
    initial_accumulator_value: float | None = None
    beta: float | None = None
    warmup_steps: int = 0
    l1_regularization: float | None = None
    l2_regularization: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFtrl(Optimizer):
    """FTRL whose l1 term zeroes a segment as a whole."""

    kind = "group_ftrl"
    renamed: ClassVar[dict[str, str]] = Ftrl.renamed
    learning_rate: float | None = None
    initial_accumulator_value: float | None = None
    beta: float | None = None
    warmup_steps: int = 0
    l1_regularization: float | None = None
    l2_regularization: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAdagrad(Optimizer):
    """Adagrad with one accumulator per segment and a group lasso."""

    kind = "group_adagrad"
    renamed: ClassVar[dict[str, str]] = {"l2_regularization": "l2_regularization_strength"}
    learning_rate: float | None = None
    beta: float | None = None
    initial_accumulator_value: float | None = None
    l2_regularization: float | None = None
    weight_decay_factor: float = 0.0
    warmup_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicWdAdagrad(Optimizer):
    """Adagrad with decoupled weight decay.

    What `enable_dynamic_wd`, `flip_direction` and `dynamic_wd_temperature` do was never published, so a table is only
    made with the first two False and the third 1.
    """

    kind = "dynamic_wd_adagrad"
    learning_rate: float | None = 0.01
    initial_accumulator_value: float | None = None
    hessian_compression_times: int = 1
    warmup_steps: int = 0
    weight_decay_factor: float = 0.0
    decouple_weight_decay: bool = True
    enable_dynamic_wd: bool = False
    flip_direction: bool = False
    dynamic_wd_temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class StochasticRoundingFloat16(Optimizer):
    """Steps like `optimizer`, then rounds every weight to one of its float16 neighbours, unbiased."""

    optimizer: OptimizerLike

    def __post_init__(self) -> None:
        self.as_proto()

    def as_proto(self) -> OptimizerConfig:
        """The inner optimizer's message with the flag set."""
        proto = part_proto(self.optimizer, OptimizerConfig)
        proto.stochastic_rounding_float16 = True
        return proto
