"""One step's gradients: clipped, brought to the dense variables and to the embeddings, and counted."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.ragged import as_floats
from trilith.pipelining import Pusher

__all__ = ["ClipType", "GradientUpdate", "UserEmbeddingCheck", "clip_by_global_norm", "clip_gradients", "global_norm"]

Float32Array = npt.NDArray[np.float32]
Gradients = Mapping[str, Float32Array]


class ClipType(enum.Enum):
    """What a gradient's norm is held against.

    GLOBAL_NORM: one norm over dense and sparse gradients. DENSE_AND_SPARSE: a norm for each of the two. VALUE: every
    value by itself. NORM: every gradient by its own norm. NONE: nothing.
    """

    GLOBAL_NORM = "global_norm"
    DENSE_AND_SPARSE = "dense_and_sparse"
    VALUE = "value"
    NORM = "norm"
    NONE = "none"


def global_norm(tensors: Sequence[npt.ArrayLike]) -> float:
    """The root of the sum of all squares, added up in float64."""
    return math.sqrt(sum(float(np.sum(np.square(each, dtype=np.float64))) for each in map(np.asarray, tensors)))


def clip_by_global_norm(
    tensors: Sequence[npt.ArrayLike], clip_norm: float, norm: float | None = None
) -> list[Float32Array]:
    """Scale tensors down together where their norm is above `clip_norm`; the inputs stay as they are.

    Args:
        tensors: Floats of any shapes.
        clip_norm: Above 0.
        norm: Of the tensors, if it is known, or of more than them.

    Returns:
        The tensors times clip_norm / norm, or unchanged; with an infinite norm infinite values become NaN, and a norm
        that is NaN changes nothing.
    """
    arrays = [as_floats(f"tensors[{i}]", each) for i, each in enumerate(tensors)]
    if not clip_norm > 0:
        raise InvalidRequestError(f"clip_norm={clip_norm} is not above 0")
    size = global_norm(arrays) if norm is None else norm
    if not size > clip_norm:
        return arrays
    with np.errstate(invalid="ignore"):
        return [each * np.float32(clip_norm / size) for each in arrays]


def clip_gradients(
    dense: Gradients,
    sparse: Gradients,
    clip_type: ClipType,
    clip_norm: float | None,
    sparse_clip_norm: float | None = None,
    warmup: float = 1.0,
) -> tuple[dict[str, Float32Array], dict[str, Float32Array]]:
    """Clip a step's gradients.

    Args:
        dense: By variable its gradient, float32 of the variable's shape.
        sparse: By embedding its gradient, float32[rows, dim].
        clip_type: How.
        clip_norm: The bound; None clips nothing (of DENSE_AND_SPARSE: no dense gradient).
        sparse_clip_norm: Another bound for sparse gradients; None is `clip_norm` (of DENSE_AND_SPARSE: none).
        warmup: What the sparse bound is multiplied by under GLOBAL_NORM, from 0 to 1.
    """
    clipped, pushed = dict(dense), dict(sparse)
    if clip_type is ClipType.DENSE_AND_SPARSE:
        if clip_norm is not None:
            clipped = _bounded(dense, clip_norm, global_norm(list(dense.values())))
        if sparse_clip_norm is not None:
            pushed = _bounded(sparse, sparse_clip_norm, global_norm(list(sparse.values())))
    elif clip_norm is None or clip_type is ClipType.NONE:
        pass
    elif clip_type is ClipType.GLOBAL_NORM:
        norm = global_norm([*dense.values(), *sparse.values()])
        clipped = _bounded(dense, clip_norm, norm)
        bound = (sparse_clip_norm or clip_norm) * warmup
        zeros = {name: np.zeros_like(each) for name, each in sparse.items()}
        pushed = _bounded(sparse, bound, norm) if bound > 0 else zeros
    elif clip_type is ClipType.VALUE:
        clipped, pushed = (
            {name: np.clip(each, -clip_norm, clip_norm) for name, each in some.items()} for some in (dense, sparse)
        )
    else:
        clipped, pushed = (
            {name: clip_by_global_norm([each], clip_norm)[0] for name, each in some.items()} for some in (dense, sparse)
        )
    return clipped, pushed


def _bounded(gradients: Gradients, bound: float, norm: float) -> dict[str, Float32Array]:
    return dict(zip(gradients, clip_by_global_norm(list(gradients.values()), bound, norm), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class UserEmbeddingCheck:
    """Holds back gradients that a batch without a user embedding makes: they say nothing of it.

    Attributes:
        features: Names of user embeddings; a variable whose name contains one of them, or "uue", is one of its.
        threshold: The Euclidean norm that the embedding must exceed in a batch for its gradients to count.
    """

    features: Sequence[str] = ()
    threshold: float = 0.0

    def checked(self, gradients: Gradients, values: Mapping[str, npt.ArrayLike]) -> dict[str, Float32Array]:
        """The gradients, zero where the embedding they belong to is too small.

        Args:
            gradients: By variable.
            values: The batch's user embeddings, by name.
        """
        passed = {}
        for variable, gradient in gradients.items():
            names = [name for name in (*self.features, "uue") if name in variable]
            unknown = [name for name in names if name not in values]
            if unknown:
                raise InvalidRequestError(
                    f"variable {variable!r}: the batch's feature {unknown[0]!r} is needed to check it, there are"
                    f" {sorted(values)}"
                )
            counts = all(global_norm([values[name]]) > self.threshold for name in names)
            passed[variable] = gradient if counts else np.zeros_like(gradient)
        return passed


@dataclass(slots=True, kw_only=True)
class GradientUpdate:
    """Applies a step's gradients: check, mean, clip, decay, dense update, sparse update, then the step counts up.

    Attributes:
        apply_dense: Takes gradients by variable.
        apply_sparse: Takes gradients by embedding and the step, the number before it counts up.
        read_dense: The values of variables, for weight decay; None without.
        clip_type: How gradients are clipped.
        clip_norm: The bound; None clips nothing.
        sparse_clip_norm: Another bound for sparse gradients.
        sparse_norm_warmup_steps: Steps until the sparse bound is reached, from 0; 0 is from the start.
        dense_weight_decay: Times the variable is added to its gradient, after clipping.
        dense_reduce_mean: Whether the loss is a sum over the batch, by whose size dense gradients are to be divided, so
            that every kind of clipping sees means.
        embedding_check: Which gradients count only if a user embedding is there.
        pusher: Makes the dense updates; its depth is how many steps they may be late. Drain it at the end.
        global_step: Steps made.
    """

    apply_dense: Callable[[dict[str, Float32Array]], None]
    apply_sparse: Callable[[dict[str, Float32Array], int], None]
    read_dense: Callable[[str], Float32Array] | None = None
    clip_type: ClipType = ClipType.GLOBAL_NORM
    clip_norm: float | None = 1000.0
    sparse_clip_norm: float | None = None
    sparse_norm_warmup_steps: int = 0
    dense_weight_decay: float = 0.0
    dense_reduce_mean: bool = False
    embedding_check: UserEmbeddingCheck | None = None
    pusher: Pusher = field(default_factory=Pusher)
    global_step: int = 0

    def __post_init__(self) -> None:
        if self.dense_weight_decay and self.read_dense is None:
            raise InvalidRequestError("weight decay needs read_dense, the variables' values")

    def step(
        self,
        dense: Mapping[str, Float32Array | None],
        sparse: Mapping[str, Float32Array | None],
        *,
        batch_size: int | None = None,
        features: Mapping[str, npt.ArrayLike] | None = None,
    ) -> None:
        """Make one step; no gradients at all are none.

        Args:
            dense: Gradients by variable; None stands for none.
            sparse: Gradients by embedding.
            batch_size: For `dense_reduce_mean`.
            features: The batch's user embeddings by name, for `embedding_check`.
        """
        given_dense, given_sparse = (
            {name: each for name, each in some.items() if each is not None} for some in (dense, sparse)
        )
        if self.embedding_check is not None:
            values = {} if features is None else features
            given_dense = self.embedding_check.checked(given_dense, values)
            given_sparse = self.embedding_check.checked(given_sparse, values)
        if self.dense_reduce_mean:
            if batch_size is None or batch_size < 1:
                raise InvalidRequestError(
                    f"batch_size={batch_size}: the mean of dense gradients needs one of at least 1"
                )
            given_dense = {name: each / np.float32(batch_size) for name, each in given_dense.items()}
        clipped, pushed = clip_gradients(
            given_dense, given_sparse, self.clip_type, self.clip_norm, self.sparse_clip_norm, self._warmup()
        )
        if not clipped and not pushed:
            return
        if self.dense_weight_decay and self.read_dense is not None:
            decay = np.float32(self.dense_weight_decay)
            clipped = {name: each + decay * self.read_dense(name) for name, each in clipped.items()}
        if clipped:
            self.pusher.push(partial(self.apply_dense, clipped))
        if pushed:
            self.apply_sparse(pushed, self.global_step)
        self.global_step += 1

    def _warmup(self) -> float:
        if not self.sparse_norm_warmup_steps:
            return 1.0
        return min(self.global_step / self.sparse_norm_warmup_steps, 1.0)
