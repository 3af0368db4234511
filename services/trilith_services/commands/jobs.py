"""Jobs on the command line: the Estimator that MODULE:JOB names, with its run and its data as flags say them."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qsl, urlsplit

import typer

from trilith.errors import InvalidRequestError
from trilith.runtime.extras import missing_extra, need
from trilith_services.commands.data_flags import known_format, known_kind
from trilith_services.options import option

if TYPE_CHECKING:
    from trilith.data import Dataset
    from trilith.estimator import Estimator

__all__ = [
    "BatchSize",
    "DataFlags",
    "Job",
    "RunFlags",
    "check_trained",
    "find_job",
    "given",
    "hint",
    "is_job",
    "refuse_alone",
]

Job = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:JOB",
        help="An Estimator, or a function that returns one, in a module of the current directory or the Python path, "
        "such as my_shop.ctr:job.",
    ),
]
BatchSize = Annotated[int, typer.Option(metavar="N", help="Samples of a batch of --data.", min=1)]

_KAFKA = ("servers", "group_id", "stream_timeout", "offset", "unframe")
_UNFRAME = {"true": True, "false": False}


def is_job(text: str) -> bool:
    """Whether this has the form MODULE:JOB, which no path has that begins with / or ./ and no URL."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", text) is not None


def given(context: typer.Context, name: str) -> bool:
    """Whether a parameter stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_alone(context: typer.Context, *names: str) -> None:
    """Refuse parameters of a job where no job is named."""
    for parameter in context.command.params:
        if parameter.name in names and given(context, parameter.name):
            raise InvalidRequestError(f"{parameter.opts[0]} is for a job of yours: name it, as MODULE:JOB")


def hint(error: Any) -> str:
    """What there is to say of jobs to whoever got the line of a command wrong that takes them; empty: nothing.

    Args:
        error: What typer raised.
    """
    parameters = error.ctx.command.params if error.ctx else ()
    if "sets" not in [parameter.name for parameter in parameters]:
        return ""
    missing = getattr(error, "param", None)
    if missing is not None and missing.name == "job":
        return f": {missing.help.removesuffix('.')}"
    flag = getattr(error, "option_name", "")
    field = _field(flag.removeprefix("--").replace("-", "_")) if flag else ""
    return f"; what a run of MODULE:JOB does is said by --set, as --set {field}=VALUE" if field else ""


def _field(name: str) -> str:
    """The field of a run that a name of a flag may stand for; empty: none."""
    from trilith.estimator import RunConfig

    return next(iter(difflib.get_close_matches(name, RunConfig.model_fields, 1, cutoff=0.8)), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFlags:
    """What is put over the run of a job."""

    sets: list[str] | None = option(
        None,
        "A field of the job's RunConfig, over --config, the environment and the code: epochs=3; may be repeated.",
        name="--set",
        metavar="NAME=VALUE",
    )
    config: str = option("", "TOML or JSON file with fields of the job's RunConfig.", metavar="FILE")

    def job(self, name: str) -> Estimator:
        """The job of that name, with these over its run; not open yet."""
        need("torch", extra="torch")
        job = find_job(name)
        return job.configure(job.run.overridden(file=self.config, sets=self.sets or ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFlags:
    """How --data of a job is read."""

    file_format: str | None = option(
        None,
        "Of --data: records, tfrecord, parquet or csv; left out: a guess, for standard input records.",
        name="--format",
        metavar="FORMAT",
        callback=known_format,
    )
    kind: str | None = option(
        None,
        "Of --data: instance, example or examplebatch; left out: a guess, for standard input and Kafka instance.",
        metavar="KIND",
        callback=known_kind,
    )

    def read(self, data: str, batch_size: int) -> Dataset:
        """Batches of a path or glob, of kafka://TOPIC, or of - (standard input).

        Raises:
            InvalidRequestError: There is no such file, or it says of Kafka what is not known.
        """
        import trilith.data

        if data.startswith("kafka://"):
            if self.file_format is not None:
                raise InvalidRequestError(f"--format {self.file_format} is for files; messages have none")
            topics, options = _topics(data)
            return trilith.data.read_kafka(topics, **options, kind=self.kind or "instance").batch(batch_size)
        return trilith.data.read("" if data == "-" else data, **self._form(data)).batch(batch_size)

    def _form(self, data: str) -> dict[str, Any]:
        """Options of `read`, guessed from the first file where they are not said."""
        from trilith.data.formats.detect import detect
        from trilith.data.formats.files import expand_glob

        said = {name: each for name, each in (("format", self.file_format), ("kind", self.kind)) if each is not None}
        if data == "-" or self.file_format is not None:
            return said
        files = expand_glob(data)
        if not files:
            raise InvalidRequestError(f"--data {data}: there is no such file")
        guess = detect(files[0])
        found: dict[str, Any] = {"format": guess.format, "kind": guess.kind, "compression": guess.compression}
        if guess.format == "records":
            found["framing"] = guess.framing
        return found | said


def _topics(url: str) -> tuple[list[str], dict[str, Any]]:
    """Topics and options of kafka://TOPIC,…?servers=host:port&group_id=…&stream_timeout=…."""
    parts = urlsplit(url)
    topics = [each for each in parts.netloc.split(",") if each]
    if not topics or parts.path.strip("/"):
        raise InvalidRequestError(
            f"--data {url}: write kafka://TOPIC, or kafka://TOPIC?servers=host:9092&group_id=NAME"
        )
    options: dict[str, Any] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _KAFKA:
            raise InvalidRequestError(f"--data {url}: {name!r} is none of {', '.join(_KAFKA)}")
        if name == "stream_timeout" and not re.fullmatch(r"-?\d+", value):
            raise InvalidRequestError(f"--data {url}: {name}={value!r} is no number of milliseconds")
        if name == "offset" and value not in ("earliest", "latest"):
            raise InvalidRequestError(f"--data {url}: offset={value!r} is neither 'earliest' nor 'latest'")
        if name == "unframe" and value not in _UNFRAME:
            raise InvalidRequestError(f"--data {url}: unframe={value!r} is neither 'true' nor 'false'")
        if name == "offset":
            options["configuration"] = [f"auto.offset.reset={value}"]
        elif name == "unframe":
            options[name] = _UNFRAME[value]
        else:
            options[name] = int(value) if name == "stream_timeout" else value
    return topics, options


def check_trained(job: Estimator) -> None:
    """Refuse to score with a model that nobody has trained: rows of this process, and no checkpoint of them."""
    from trilith.estimator.keeping import newest_job

    run = job.run
    if not run.cluster.startswith(("local://", "peers://")):
        return
    if not run.model_dir:
        why = "the run has no model_dir"
    elif run.warm_start or run.resume not in ("latest", "never"):
        return
    elif run.resume == "never":
        why = "resume='never' takes no checkpoint"
    elif newest_job(run.model_dir) is None:
        why = f"model_dir={run.model_dir!r} has no checkpoint"
    else:
        return
    raise InvalidRequestError(
        f"nothing is trained: rows are in this process (cluster={run.cluster!r}), and {why}; train first, or say "
        "--set model_dir=DIR or --set cluster=ADDRESS"
    )


# ---- finding a job -------------------------------------------------------------------------------------------------


def find_job(name: str) -> Estimator:
    """The Estimator that MODULE:JOB names; the current directory is searched first.

    An exception that the module raises is shown with its own traceback.

    Raises:
        InvalidRequestError: There is no such module or attribute, it is no Estimator, or it raised.
    """
    from trilith.estimator import Estimator

    if not is_job(name):
        raise InvalidRequestError(f"{name!r} is not MODULE:JOB, such as my_shop.ctr:job")
    module_name, _, attributes = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    found: Any = _module(module_name)
    path = module_name
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise InvalidRequestError(f"{path} has no {attribute!r}{_instead(found, attribute)}")
        found = getattr(found, attribute)
        path += f".{attribute}"
    called = ""
    if not isinstance(found, Estimator) and inspect.isroutine(found):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise InvalidRequestError(f"{name}() cannot be called without arguments: {error}") from None
        called = "() returned"
        found = _guarded(found, f"{name}()")
    if not isinstance(found, Estimator):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise InvalidRequestError(f"{name}{called or ' is'} {what}, not a trilith.estimator.Estimator")
    return found


def _module(name: str) -> Any:
    try:
        return _guarded(lambda: importlib.import_module(name), f"importing {name}", but=name)
    except ModuleNotFoundError:
        near = difflib.get_close_matches(name, [path.stem for path in Path().glob("*.py")], 1)
        hint = f"; do you mean {near[0]!r}?" if near else ""
        raise InvalidRequestError(f"no module {name!r} in {Path.cwd()} or the Python path{hint}") from None


def _instead(module: Any, attribute: str) -> str:
    """What somebody may have meant: a near name, or the estimators that are there."""
    from trilith.estimator import Estimator

    names = [name for name in vars(module) if not name.startswith("_")] if hasattr(module, "__dict__") else []
    near = difflib.get_close_matches(attribute, names, 1)
    jobs = [name for name in names if isinstance(getattr(module, name), Estimator)]
    if near:
        return f"; do you mean {near[0]!r}?"
    return f"; its estimators are {', '.join(jobs)}" if jobs else ""


def _guarded(call: Any, doing: str, *, but: str = "") -> Any:
    """Call what is the user's; what it raises is shown as Python would, and then said in a line.

    Raises:
        ModuleNotFoundError: The module `but`, or a package it is in, is not there.
        InvalidRequestError: Anything else was raised.
    """
    try:
        return call()
    except ModuleNotFoundError as error:
        if but and error.name and f"{but}.".startswith(f"{error.name}."):
            raise
        if missing_extra(error) is not error:
            raise
        cause: BaseException = error
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a user's module does
        cause = error
    shown = traceback.TracebackException.from_exception(cause)
    frames = [frame for frame in shown.stack if not _ours(frame.filename)]
    shown.stack[:] = frames
    typer.echo("".join(shown.format()), err=True, nl=False)
    said = f"exit status {cause.code}" if isinstance(cause, SystemExit) else str(cause).partition("\n")[0]
    raise InvalidRequestError(f"{doing}: {type(cause).__name__}: {said}") from None


def _ours(filename: str) -> bool:
    """Whether a frame is of this module, or of the machinery of imports."""
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen importlib")
