"""RunConfig: everything that a run can be told, from flags over environment and file to what the code says."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trilith.discovery.addresses import check_address
from trilith.discovery.urls import FORMS
from trilith.discovery.zk_url import redact
from trilith.errors import InvalidRequestError
from trilith.estimator.identity import WorkerIdentity

__all__ = ["OF_ONE_WORKER", "VARIABLES", "RunConfig"]

VARIABLES = "TRILITH_RUN_"
"""Environment variables that begin so set a field: TRILITH_RUN_EPOCHS=3."""

OF_ONE_WORKER = frozenset({"rank", "world_size", "local_rank", "local_world_size", "master", "metrics_port", "events"})
"""Fields that tell a worker from the others, or one start of a run from the next; they are not stored with a run."""

_LOCAL, _PEERS = "local://", "peers://"
_SCHEMES = (_LOCAL, _PEERS, *(f"{scheme}://" for scheme in FORMS))

_OBJECTS = ("params_override", "warm_start_aliases")
_OF_WARM_START = ("warm_start_parts", "warm_start_aliases", "warm_start_match", "warm_start_keep_step")

_CREDENTIALS = re.compile(r"^([a-z][a-z0-9+.-]*://)[^/?#]*@", re.IGNORECASE)
_PASSWORD = re.compile(r"^[a-z][a-z0-9+.-]*://[^/?#]*:[^/?#]*@", re.IGNORECASE)

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RunConfig(BaseModel):
    """What a run does, and where. Frozen; every field has a default.

    `RunConfig(epochs=3)` is what the code says; `overridden` puts a file, the environment and flags over it. A `repr`
    shows no password of an address.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    # ---- where

    name: str = ""
    """Of the run, in metrics and logs; empty: the name of the task's class."""
    cluster: str = _LOCAL
    """Who holds the rows: "local://" this process, "peers://" the workers among themselves, or the PS at any address
    that `trilith.connect` takes, such as zk://host:2181/path."""
    owns_cluster: bool = False
    """The PS are this run's alone: it may restore them to a checkpoint."""
    shut_down_ps: bool = False
    """PS end, with status 0, when all is trained and saved and the workers close. They are this run's own
    (owns_cluster) and were started with `trilith ps --owned`."""
    model_dir: str = ""
    """Directory or URL of checkpoints; empty: nothing is saved."""
    timeout_s: Seconds = 120.0
    """How long a call waits for a PS that is away, and workers for each other to meet."""
    float16_transfer: bool = False
    """Rows and gradients travel as float16."""

    # ---- how long

    epochs: Positive = 1
    """Passes over the training data."""
    steps: Count = 0
    """Training ends after so many steps of this worker, of `accumulate` batches each; 0: no limit."""
    max_steps: Count = 0
    """Training ends when all workers together have done so many steps, earlier runs included; 0: no limit."""
    seed: Count = 0
    """Decides what layers begin with and what torch draws; rows and orders of samples have seeds of their own."""

    # ---- a step

    accumulate: Positive = 1
    """Batches whose gradients are summed up to one step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the dense part computes in: bf16 and fp16 by autocast, fp16 with scaled losses."""
    compile: bool = False
    """The dense part goes through torch.compile, which needs a C++ compiler and some seconds at the start."""
    clip_norm: Amount = 0.0
    """Bound on the norm of a step's gradients, of rows and dense parameters together; 0: none."""
    skip_non_finite: bool = False
    """A step whose loss or gradients are NaN or infinite is left out and counted; else it ends training."""
    row_gradients: Literal["mean", "sum"] = "mean"
    """Gradients of rows when dense ones are all-reduced: divided by the number of workers like those, or added up."""
    dense: Literal["auto", "local", "ps", "allreduce"] = "auto"
    """Where dense parameters are: in this process, on the PS (asynchronous), or all-reduced every step. auto: local for
    one worker; else all-reduced with a torch optimizer, on the PS with one of trilith.tables."""
    prefetch: Count = 0
    """Batches whose rows are looked up ahead; 0: every lookup sees every step before it."""
    async_push: Count = 0
    """Updates that may be on their way; 0: wait for each."""
    lookup_queue: Count = 0
    """With peers://: batches whose rows their owners have found and that wait to travel."""
    update_queue: Count = 0
    """With peers://: updates that have travelled and wait to be applied."""

    # ---- checkpoints

    save_every: Count = 0
    """Steps of all workers between two checkpoints; 0: one at the end alone."""
    save_every_s: Amount = 0.0
    """Seconds between two checkpoints; 0: steps alone decide."""
    save_every_event_s: Count = 0
    """Seconds of the samples' own time, request_time of the task, between two checkpoints: one is due when a multiple
    of them is passed, such as a full hour with 3600; 0: other rules decide."""
    save_dense_every: Count = 0
    """Steps of all workers between two saves of the dense part alone, in the folder dense_only of model_dir; 0: none.
    export_every_save exports each of them without rows, for replicas that training keeps fresh."""
    save_on_stop: bool = True
    """SIGTERM, SIGINT and a callback's Stop save before they end training."""
    resume: str = "latest"
    """Where a run goes on: latest, at model_dir's newest checkpoint; never, anew; or the path of a checkpoint."""
    warm_start: str = ""
    """Checkpoint that a new run begins with; of no effect where there is one to resume."""
    warm_start_parts: Literal["all", "rows", "dense"] = "all"
    """What is taken from warm_start."""
    warm_start_aliases: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Dense parameters that have another name in warm_start: {"new.name": "old.name"}. Of several old names the tensors
    are joined along axis 0, and among several new names with one old one its tensor is cut so."""
    warm_start_match: Literal["exact", "auto", "present"] = "exact"
    """What happens about names without an alias. exact: all must be in warm_start, and no others; auto: layers that
    were renamed or renumbered are found; present: what is there by name and shape is taken, the rest begins anew."""
    warm_start_keep_step: bool = True
    """The step goes on with the rows of warm_start; else it begins at 0."""
    reset_dense: str = ""
    """Any text that names a change of the model: where the checkpoint that a run goes on at was written under another
    one, dense parameters and their optimizer begin anew, and rows, step and position go on. Checkpoints keep it, so
    that it happens once."""
    keep_newest: Positive = 3
    """Checkpoints that are kept, the newest ones; those that other rules keep do not count."""
    keep_every_hours: Amount = 0.0
    """Also one in so many hours is kept for good; 0: none."""
    keep_best: str = ""
    """Also the best by this metric is kept, such as valid/click/auc."""
    keep_best_mode: Literal["", "max", "min"] = ""
    """Whether more of keep_best is better; empty: by the metric's name."""
    keep_best_count: Positive = 1
    """How many of the best are kept."""
    keep_exempt: tuple[str, ...] = ()
    """Names of checkpoints that are never removed."""

    # ---- evaluation and exports

    evaluate_every: Count = 0
    """Steps of all workers between two evaluations; 0: none while an epoch goes on."""
    evaluate_every_epoch: bool = True
    """Evaluate after every epoch."""
    evaluate_steps: Count = 0
    """Batches of one evaluation; 0: all."""
    export_dir: str = ""
    """Directory or URL of exports; empty: exports in model_dir."""
    export_every_save: bool = False
    """Every checkpoint is exported as well."""
    export_keep: Positive = 5
    """Versions in the directory of exports that are kept, the newest ones, beside one that entries are pinned to."""
    export_warm_up: Count = 0
    """Samples of the job's data that an export carries for entries to score before it answers."""
    export_mode: Literal["distributed", "standalone"] = "distributed"
    """Rows in parts for replicas, or with the model in one."""

    # ---- this machine

    device: str = "auto"
    """cpu, cuda (the GPU of the local rank), cuda:N, or auto: cuda where there is one."""
    use_gpu: bool = True
    """False: the CPU, whatever device says."""
    processes_per_gpu: Positive = 1
    """Neighbouring local ranks that share a GPU."""
    threads: Count = 0
    """torch threads; 0: the cores, shared by the workers of this machine."""

    # ---- which worker this is; left out: what `WorkerIdentity.find` finds

    rank: Count | None = None
    """Number of this worker, from 0."""
    world_size: Positive | None = None
    """How many there are."""
    local_rank: Count | None = None
    """Number of this worker on its machine, from 0."""
    local_world_size: Positive | None = None
    """How many are on this machine."""
    master: str = ""
    """host:port where rank 0 meets the others."""

    # ---- what it says

    events: str = ""
    """File that events are appended to, a JSON object per line; {rank} stands for the rank."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port where metrics are served for Prometheus; 0: any free one."""
    metrics_host: str = "127.0.0.1"
    """Interface of that port."""
    progress: Literal["auto", "bars", "lines", "none"] = "auto"
    """How progress is shown: bars on a terminal, else lines; or nothing."""
    log_every_s: Seconds = 2.0
    """Seconds between two lines of progress, and between two steps in the file of events."""

    # ---- the task

    params_override: dict[str, Any] = Field(default_factory=dict)
    """Values by field of the Task, dots for fields of fields: {"user.dim": 32}."""

    if TYPE_CHECKING:

        def _take(self, values: dict[str, Any], origins: Mapping[str, str]) -> None: ...

    else:  # a type checker sees the fields as arguments

        def __init__(self, **values):
            """Take values by field.

            Raises:
                InvalidRequestError: One is unknown, wrong, or impossible with the others; the message names the field.
            """
            self._take(values, {})

        def _take(self, values, origins):
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _refusal(error, origins) from None

    # ---- what goes with what

    @field_validator("keep_exempt", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [each.strip() for each in value.split(",") if each.strip()] if isinstance(value, str) else value

    @field_validator("cluster")
    @classmethod
    def _check_cluster(cls, value: str) -> str:
        if not value.startswith(_SCHEMES):
            raise ValueError(f"cluster={redact(value)!r} begins with none of {', '.join(_SCHEMES)}")
        return value

    @field_validator("master")
    @classmethod
    def _check_master(cls, value: str) -> str:
        return check_address(value) if value else value

    @field_validator("resume")
    @classmethod
    def _check_resume(cls, value: str) -> str:
        if not value:
            raise ValueError("resume is empty; write latest, never, or the path of a checkpoint")
        return value

    @field_validator("model_dir", "warm_start", "resume", "export_dir")
    @classmethod
    def _check_folder(cls, value: str) -> str:
        # Paths below it are told to PS, to whoever reads logs, and to callbacks.
        if _PASSWORD.match(value):
            raise ValueError(
                "a password in an address would be in logs and checkpoints; give it as the store takes it otherwise: "
                "environment variables, its own file, or fsspec's configuration"
            )
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for wrong in self._conflicts():
            raise ValueError(wrong)
        return self

    def _conflicts(self) -> Iterator[str]:
        def given(*names: str) -> Iterator[str]:
            for name in names:
                value = getattr(self, name)
                if value != type(self).model_fields[name].get_default(call_default_factory=True):
                    yield f"{name}={value!r}" if "://" not in str(value) else f"{name}={redact(str(value))!r}"

        if not self.model_dir:
            saves = given(
                "save_every",
                "save_every_s",
                "save_every_event_s",
                "save_dense_every",
                "keep_newest",
                "keep_every_hours",
                "keep_best",
            )
            yield from (f"{each} needs model_dir, where checkpoints go" for each in saves)
            if self.export_every_save:
                yield "export_every_save exports checkpoints, and there are none without model_dir"
        if self.shut_down_ps and not self.model_dir:
            yield "shut_down_ps needs model_dir: what was learned would end with the PS"
        if self.shut_down_ps and not self.owns_cluster:
            yield "shut_down_ps needs owns_cluster: only PS that are this run's alone may be ended by it"
        if self.keep_best and not (self.evaluate_every or self.evaluate_every_epoch):
            yield f"keep_best={self.keep_best!r} needs evaluations: set evaluate_every or evaluate_every_epoch"
        if not self.keep_best:
            yield from (f"{each} needs keep_best, the metric" for each in given("keep_best_mode", "keep_best_count"))
        if self.warm_start and self.resume not in ("latest", "never"):
            yield f"warm_start and resume={self.resume!r} both say where to begin; give one"
        if self.reset_dense and (self.resume == "never" or not (self.model_dir or self.resume != "latest")):
            yield f"reset_dense={self.reset_dense!r} is for a run that goes on, at a checkpoint of model_dir or PATH"
        if not self.warm_start:
            yield from (f"{each} needs warm_start, the checkpoint" for each in given(*_OF_WARM_START))
        elif self.warm_start_parts == "rows":
            for each in given("warm_start_aliases", "warm_start_match"):
                yield f"{each} with warm_start_parts='rows': no dense parameter is taken"
        elif self.warm_start_parts == "dense" and not self.warm_start_keep_step:
            yield "warm_start_keep_step=False with warm_start_parts='dense': the step comes with rows, and begins at 0"
        yield from self._conflicts_of_places(given)
        if self.rank is not None and self.world_size is not None and self.rank >= self.world_size:
            yield f"rank={self.rank} is outside 0..world_size - 1, with world_size={self.world_size}"

    def _conflicts_of_places(self, given: Any) -> Iterator[str]:
        """Rows are somewhere, dense parameters are somewhere, and not every pair of places works."""
        several = (self.world_size or 1) > 1
        if self.cluster.startswith(_PEERS):
            if self.dense not in ("auto", "allreduce"):
                yield f"dense={self.dense!r} with cluster='peers://': workers with rows step together"
            if self.owns_cluster:
                yield "owns_cluster with cluster='peers://': there are no PS to own"
        else:
            yield from (f"{each} is for cluster='peers://'" for each in given("lookup_queue", "update_queue"))
        if self.cluster.startswith(_LOCAL):
            if several:
                yield f"world_size={self.world_size} with cluster='local://': every worker would have rows of its own"
            yield from (f"{each} with cluster='local://': nothing travels" for each in given("float16_transfer"))
        if self.dense == "local" and several:
            yield f"dense='local' with world_size={self.world_size}: every worker would have a model of its own"
        if self.row_gradients == "sum" and self.dense in ("local", "ps"):
            yield f"row_gradients='sum' with dense={self.dense!r}: workers do not step together"

    # ---- layers

    def overridden(
        self,
        *,
        file: str | Path = "",
        environ: Mapping[str, str] | None = None,
        sets: Iterable[str] = (),
    ) -> Self:
        """What is said elsewhere put over this, which is what the code says.

        Args:
            file: A TOML or JSON file with values by field; empty: none.
            environ: Environment variables, of which TRILITH_RUN_* are read; None: this process's.
            sets: "name=value" each, as after `--set`; they win over the environment, which wins over the file, and
                later ones over earlier ones.

        A field of params_override is set by `params_override.NAME=value`, and so is one of warm_start_aliases. Text
        stands for what the field needs: a number, true or false, JSON for objects and lists, "none" for nothing where a
        field can be that.

        Raises:
            InvalidRequestError: A name is unknown (the nearest known one is named), a value impossible, or the file
                cannot be read; the message says where it stands.
        """
        environ = os.environ if environ is None else environ
        values = {name: getattr(self, name) for name in self.model_fields_set}
        values |= {name: dict(getattr(self, name)) for name in _OBJECTS}
        origins: dict[str, str] = {}
        for origin, name, value in (*_of_file(file), *_of_environment(environ), *_of_sets(sets)):
            top, dot, rest = name.partition(".")
            if top not in type(self).model_fields or (dot and top not in _OBJECTS):
                raise InvalidRequestError(f"{origin}: {_unknown(name)}")
            origins[top] = origin
            if dot:
                values[top] = {**values[top], rest: _parsed(value)}
            elif top in _OBJECTS:
                values[top] = _mapping(origin, top, value)
            else:
                nothing = isinstance(value, str) and value.lower() == "none" and _may_be_none(top)
                values[top] = None if nothing else value
        fresh = type(self).__new__(type(self))
        fresh._take(values, origins)
        return fresh

    def identity(self, environ: Mapping[str, str] | None = None) -> WorkerIdentity:
        """Which worker this is, by `rank` and its like, else by the environment; see `WorkerIdentity.find`."""
        return WorkerIdentity.find(
            environ,
            rank=self.rank,
            world_size=self.world_size,
            local_rank=self.local_rank,
            local_world_size=self.local_world_size,
            master=self.master,
        )

    # ---- out and in

    def non_defaults(self) -> dict[str, Any]:
        """Fields that differ from their defaults, by name; addresses without passwords, so that it may be logged."""
        shown = self._public()
        defaults = {name: each.get_default(call_default_factory=True) for name, each in type(self).model_fields.items()}
        return {name: shown[name] for name, default in defaults.items() if getattr(self, name) != default}

    def to_json(self) -> str:
        """The run as JSON, as it is stored in checkpoints and exports.

        Users and passwords of addresses are left out, and so are the fields `OF_ONE_WORKER`.
        """
        shown = {name: value for name, value in self._public(without=True).items() if name not in OF_ONE_WORKER}
        return json.dumps(shown, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` made.

        Raises:
            InvalidRequestError: It is no JSON object, or a field is unknown or wrong.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InvalidRequestError(f"a stored run is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise InvalidRequestError(f"a stored run is a JSON object, not {text[:80]!r}")
        return cls(**values)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """What repr and str show: what is not the default, without passwords."""
        yield from self.non_defaults().items()

    def _public(self, *, without: bool = False) -> dict[str, Any]:
        """Values by name with addresses redacted, or without users and passwords at all."""
        instead = "" if without else "***@"

        def shown(value: Any) -> Any:
            if isinstance(value, str):
                return _CREDENTIALS.sub(rf"\1{instead}", value)  # an @ in a path is none of its business
            if isinstance(value, Mapping):
                return {name: shown(each) for name, each in value.items()}
            if isinstance(value, tuple | list):
                return type(value)(shown(each) for each in value)
            return value

        values = {name: shown(getattr(self, name)) for name in type(self).model_fields}
        values["cluster"] = redact(self.cluster).replace("***@", instead)
        return values


# ---- layers --------------------------------------------------------------------------------------------------------


def _of_file(file: str | Path) -> Iterator[tuple[str, str, Any]]:
    if not str(file):
        return
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidRequestError(f"--config {path}: it is not UTF-8") from None
    if path.suffix not in (".toml", ".json"):
        raise InvalidRequestError(f"--config {path}: it must be a .toml or .json file")
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise InvalidRequestError(f"--config {path}: it holds no values by name")
    yield from ((f"--config {path}", name, value) for name, value in values.items())


def _of_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    for variable, value in sorted(environ.items()):
        if variable.startswith(VARIABLES):
            yield f"${variable}", variable[len(VARIABLES) :].lower(), value


def _of_sets(sets: Iterable[str]) -> Iterator[tuple[str, str, Any]]:
    for each in sets:
        name, equals, value = each.partition("=")
        if not equals:
            raise InvalidRequestError(f"--set {each}: write name=value")
        yield f"--set {_shown_set(each)}", name.strip(), value.strip()


def _shown_set(text: str) -> str:
    """A "name=value" as it may be shown."""
    name, _, value = text.partition("=")
    return f"{name}={redact(value)}"


def _parsed(value: Any) -> Any:
    """JSON where it is JSON, else the text itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _may_be_none(name: str) -> bool:
    """Whether a field can be nothing at all, so that "none" is not one of its words."""
    return type(None) in get_args(RunConfig.model_fields[name].annotation)


def _mapping(origin: str, name: str, value: Any) -> dict[str, Any]:
    found = _parsed(value)
    if not isinstance(found, dict):
        raise InvalidRequestError(f"{origin}: {name} is an object of values by name, not {value!r}")
    return found


# ---- messages ------------------------------------------------------------------------------------------------------


def _unknown(name: str) -> str:
    names = list(RunConfig.model_fields)
    near = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    return f"a run has no {name!r}" + (f"; do you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}")


def _refusal(error: ValidationError, origins: Mapping[str, str]) -> InvalidRequestError:
    """The first of pydantic's complaints in one line, with the field, its value, and where it was said."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(_unknown(name))
    text = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if not name:
        said = [f" ({origin})" for field, origin in origins.items() if f"{field}=" in text or f"{field} " in text]
        return InvalidRequestError(text + "".join(said))
    given = first["input"]
    shown = redact(given) if isinstance(given, str) else given
    said_at = f"{origins[name]}: " if name in origins else ""
    return InvalidRequestError(said_at + (text if text.startswith(f"{name}=") else f"{name}={shown!r}: {text}"))
