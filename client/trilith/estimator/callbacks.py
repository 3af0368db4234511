"""Callbacks: what is told of a run's events and may end it; and those that decide by a metric."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from trilith.errors import InvalidRequestError
from trilith.estimator.events import EVENTS, Done, Evaluated, Event, Failed, Saved, Started, Stop, Stopped
from trilith.estimator.metrics import direction

__all__ = ["BestByMetric", "Callback", "Callbacks", "EarlyStopping", "Kept"]

log = logging.getLogger(__name__)

Mode = Literal["max", "min"]


class Callback:
    """Is told of every event of one worker's run, in its training thread.

    A subclass has methods `on_step(event)`, `on_evaluated(event)` and so on, by the names in `events.EVENTS`, or one
    `on(event)` that takes them all. Each may return a `Stop`, which ends training in every worker after the step. What
    one raises ends training with that error.
    """

    chief_only: ClassVar[bool] = False
    """Only the chief tells it; for what would be the same from every worker."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        for name in vars(cls):
            if name.startswith("on_") and name[3:] not in EVENTS:
                near = difflib.get_close_matches(name[3:], EVENTS, n=1)
                hint = f"do you mean on_{near[0]}" if near else f"there are {', '.join(EVENTS)}"
                raise InvalidRequestError(f"{cls.__name__}.{name}: no event is called {name[3:]!r}; {hint}")

    def on(self, event: Event) -> Stop | None:
        """Take an event."""
        method = getattr(self, f"on_{event.name}", None)
        return None if method is None else method(event)

    def close(self) -> None:
        """Give up what is held open; after the last event, also where training failed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON can."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""


class Callbacks:
    """Several callbacks, told in order.

    Args:
        callbacks: They.
        chief: Whether this worker is the chief; where not, those for the chief alone are left out.
    """

    def __init__(self, callbacks: Iterable[Callback], *, chief: bool = True) -> None:
        self._callbacks: Sequence[Callback] = []
        given = list(callbacks)
        for each in given:
            if not isinstance(each, Callback):
                what = "class; write it with ()" if isinstance(each, type) else f"{type(each).__name__}"
                raise InvalidRequestError(f"callbacks are instances of Callback; {each!r} is a {what}")
        self._callbacks = [each for each in given if chief or not each.chief_only]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(quiet=error is not None)

    def tell(self, event: Event) -> Stop | None:
        """Tell all of them; returns the first Stop, and says in the log whose it is.

        What one raises is raised here, with a note that says whose it is. Of how training ended all are told first; of
        a `Failed` run, errors of callbacks are logged, for the failure itself is about to be raised.
        """
        last = isinstance(event, Done | Stopped | Failed)
        stop: Stop | None = None
        first: Exception | None = None
        for each in self._callbacks:
            try:
                said = each.on(event)
                if said is not None and not isinstance(said, Stop):
                    raise InvalidRequestError(f"it returned {said!r}; it may return a Stop(reason) or nothing")
            except Exception as error:
                error.add_note(f"raised by callback {type(each).__name__} when told of {event.name}")
                if not last:
                    raise
                first = first or error
                continue
            if said is not None and stop is None:
                stop = said
                log.info("%s ends training%s", type(each).__name__, f": {said.reason}" if said.reason else "")
        if first is not None:
            if not isinstance(event, Failed):
                raise first
            log.error("a callback failed when told of a failure", exc_info=first)
        return stop

    def close(self, *, quiet: bool = False) -> None:
        """Close all, then raise the first error; `quiet` logs it."""
        first: Exception | None = None
        for each in self._callbacks:
            try:
                each.close()
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises
                error.add_note(f"raised by callback {type(each).__name__} when closed")
                first = first or error
        if first is not None:
            if not quiet:
                raise first
            log.error("a callback could not be closed", exc_info=first)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of them, by class and number."""
        return {name: state for name, each in self._named() if (state := each.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave; callbacks that were not there begin anew."""
        for name, each in self._named():
            if name in state:
                each.load_state_dict(state[name])

    def _named(self) -> Iterable[tuple[str, Callback]]:
        counts: dict[str, int] = {}
        for each in self._callbacks:
            kind = type(each).__name__
            counts[kind] = number = counts.get(kind, 0) + 1
            yield (kind if number == 1 else f"{kind}-{number}"), each


# ---- decisions by a metric -----------------------------------------------------------------------------------------


class _ByMetric(Callback):
    """Looks at one figure of every evaluation."""

    def __init__(self, metric: str, mode: Mode | None) -> None:
        if mode not in ("max", "min", None):
            raise InvalidRequestError(f"mode={mode!r} is neither 'max' nor 'min'")
        self.metric = metric
        self.mode: Mode = mode or direction(metric)

    def on_started(self, event: Started) -> None:
        """Refuse a figure that no evaluation will have, before anything is learned in vain."""
        if event.rank == 0:  # others may leave evaluations to it
            self._check(event.figures)

    def _check(self, figures: Collection[str]) -> None:
        if self.metric in figures:
            return
        near = difflib.get_close_matches(self.metric, figures, n=1, cutoff=0.5)
        hint = f"; do you mean {near[0]!r}?" if near else ""
        said = "there is no evaluation: give the Estimator evaluate=, and set evaluate_every or evaluate_every_epoch"
        if figures:
            said = f"an evaluation has no such figure, but {', '.join(figures)}{hint}"
        raise InvalidRequestError(f"{type(self).__name__}({self.metric!r}): {said}")

    def _of(self, event: Evaluated) -> float:
        self._check(event.metrics)
        return event.metrics[self.metric]

    def _is_better(self, value: float, best: float | None, by: float = 0.0) -> bool:
        """Whether it is better by more than so much; NaN never is."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        return value > best + by if self.mode == "max" else value < best - by


class EarlyStopping(_ByMetric):
    """Ends training when a figure has not improved for so many evaluations in a row.

    Args:
        metric: Its name in `Evaluated.metrics`, such as "valid/click/auc".
        patience: Evaluations without improvement that are borne; the next one ends training.
        mode: "max" or "min", whichever is better; None: by the name.
        min_delta: By how much a value must be better to count.
    """

    def __init__(self, metric: str, patience: int = 0, *, mode: Mode | None = None, min_delta: float = 0.0) -> None:
        super().__init__(metric, mode)
        if patience < 0:
            raise InvalidRequestError(f"patience={patience} is below 0")
        if not (min_delta >= 0 and math.isfinite(min_delta)):
            raise InvalidRequestError(f"min_delta={min_delta} is below 0 or not finite")
        self.patience = patience
        self.min_delta = min_delta
        self.best: float | None = None
        """The best value so far."""
        self.waited = 0
        """Evaluations since then."""

    def on_evaluated(self, event: Evaluated) -> Stop | None:
        """Compare with the best."""
        value = self._of(event)
        if self._is_better(value, self.best, self.min_delta):
            self.best, self.waited = value, 0
            return None
        self.waited += 1
        if self.waited <= self.patience:
            return None
        best = "it was never a number" if self.best is None else f"the best was {self.best:.6g}"
        return Stop(f"{self.metric} has not improved for {self.waited} evaluations: {value:.6g}, {best}")

    def state_dict(self) -> dict[str, Any]:
        """The best value and how long ago it was."""
        return {"metric": self.metric, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting, unless another metric was watched."""
        if state.get("metric") == self.metric:
            self.best, self.waited = state["best"], int(state["waited"])


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that was among the best when it was saved.

    Attributes:
        path: Of it.
        step: Of it.
        value: Of the metric, at the newest evaluation up to that step.
    """

    path: str
    step: int
    value: float


class BestByMetric(_ByMetric):
    """Knows which checkpoints are the best by a figure, for whoever removes old ones; ties go to the older.

    A checkpoint counts with the evaluation of its own step, whichever came first, else with the newest before it.

    Args:
        metric: Its name in `Evaluated.metrics`.
        mode: "max" or "min", whichever is better; None: by the name.
        count: How many are kept.
    """

    def __init__(self, metric: str, *, mode: Mode | None = None, count: int = 1) -> None:
        super().__init__(metric, mode)
        if count < 1:
            raise InvalidRequestError(f"count={count} is below 1")
        self.count = count
        self.best: tuple[Kept, ...] = ()
        """The best checkpoints, best first."""
        self._value: float = math.nan
        self._newest: tuple[str, int] | None = None

    @property
    def paths(self) -> frozenset[str]:
        """Paths that shall not be removed; the newest save, which may yet be evaluated, among them."""
        newest = {self._newest[0]} if self._newest else set()
        return frozenset({each.path for each in self.best} | newest)

    def on_evaluated(self, event: Evaluated) -> None:
        """A save of this step has this value now."""
        self._value = self._of(event)
        if self._newest is not None and self._newest[1] == event.step:
            self._place(*self._newest)

    def on_saved(self, event: Saved) -> None:
        """A checkpoint has the value of the newest evaluation."""
        if event.dense_only:
            return
        self._newest = event.path, event.step
        self._place(event.path, event.step)

    def _place(self, path: str, step: int) -> None:
        others = [each for each in self.best if each.path != path]
        if not math.isnan(self._value):
            others.append(Kept(path, step, self._value))
        sign = -1.0 if self.mode == "max" else 1.0
        self.best = tuple(sorted(others, key=lambda each: (sign * each.value, each.step))[: self.count])

    def state_dict(self) -> dict[str, Any]:
        """The best checkpoints."""
        return {"metric": self.metric, "best": [asdict(each) for each in self.best]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Know them again, unless another metric was watched."""
        if state.get("metric") == self.metric:
            self.best = tuple(Kept(**each) for each in state["best"])
