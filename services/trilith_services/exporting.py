"""From a checkpoint to an export: the model's program and weights, its tables, and rows as they are served."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trilith.checkpoint import hold, newest_complete, read_manifest
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.folder import Folder
from trilith.nn.program import (
    check_program,
    current_weights,
    export_program,
    join_weights,
    only_inputs,
    pack_weights,
    set_parameters,
    used_inputs,
)
from trilith.serving.exports import (
    ENTRY,
    ROWS,
    SERVING_DEFAULT,
    ExportManifest,
    Mode,
    ModelConfig,
    ProgramInput,
    ServedFeature,
    Signature,
    check_signature_name,
    new_version,
    prune_versions,
    ps_base,
    ps_bases,
    write_manifest,
    write_model,
)
from trilith.serving.published import read_published
from trilith_services.ps.checkpoint.serving_rows import dense_values, serving_tables, write_serving_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Exported", "Exporter", "find_checkpoint"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An export that was written."""

    version: int
    path: str
    step: int
    rows: int


class Exporter:
    """Writes exports of one model, again and again as it is trained; the program is traced once. Not thread-safe.

    Args:
        name: Of the model.
        module: Takes the inputs, gives the outputs; its parameters are what `dense` lists.
        dense: The module whose parameters training keeps as dense variables; `module` itself or a part of it.
        features: By name.
        inputs: What `module` takes, in order.
        outputs: Names of what it gives, in order.
        load: Gives `module` the values that a checkpoint has for it; None: `dense` has them as dense variables.
        signatures: Further programs by name, each a module and the names of its outputs: it takes what `module` takes
            and has the same parameters by the same names; inputs that it makes no use of are not looked up for it.

    Raises:
        InvalidRequestError: Something in `module` changes in training that no checkpoint has: buffers such as running
            means, or parameters beside `dense`.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        dense: nn.Module | None = None,
        features: Mapping[str, ServedFeature],
        inputs: Iterable[ProgramInput],
        outputs: Iterable[str] = ("score",),
        load: Callable[[str], None] | None = None,
        signatures: Mapping[str, tuple[nn.Module, Sequence[str]]] | None = None,
    ) -> None:
        self._name = name
        self._module = module
        self._dense = module if dense is None else dense
        self._features = dict(features)
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._signatures = dict(signatures or {})
        for each in self._signatures:
            check_signature_name(each)
        self._traced: tuple[bytes, dict[str, Tensor]] | None = None
        self._others: dict[str, tuple[Signature, bytes, dict[str, Tensor]]] = {}
        self._load = load
        if load is None:
            _check_stored(self._module, self._dense)

    def export(
        self,
        checkpoint: str,
        base: str,
        *,
        mode: Mode = "distributed",
        dense_only: bool = False,
        keep: int = 5,
        warm_up: bytes = b"",
        step: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Exported:
        """Write the next version below `base`.

        Args:
            checkpoint: A complete checkpoint.
            base: Directory or URL of the exports.
            mode: "standalone" has all rows inside; "distributed" is a model that looks rows up at serving replicas, and
                the rows of each shard beside it.
            dense_only: Of a distributed export only the model: the rows come from replicas that training keeps fresh.
            keep: Newest versions to keep, beside one that entries are pinned to; at least 1.
            warm_up: Requests that an entry scores before the version answers: a line of JSON each, as POST /v1/predict
                takes them.
            step: Of the values that `load` gives, where they are not the checkpoint's.
            clock: Unix seconds.

        Raises:
            CheckpointError: The checkpoint is incomplete, damaged, or of another model.
        """
        if mode not in ("standalone", "distributed"):
            raise InvalidRequestError(f"mode {mode!r} is neither 'standalone' nor 'distributed'")
        if dense_only and mode == "standalone":
            raise InvalidRequestError(
                "a standalone export has all rows inside: dense_only is for mode='distributed', with rows at replicas"
            )
        if keep < 1:
            raise InvalidRequestError(f"keep={keep}: at least 1 version is kept, the one that is written")
        with hold(checkpoint):
            return self._export(
                checkpoint, base, mode=mode, dense_only=dense_only, keep=keep, warm_up=warm_up, step=step, clock=clock
            )

    def _export(
        self,
        checkpoint: str,
        base: str,
        *,
        mode: Mode,
        dense_only: bool,
        keep: int,
        warm_up: bytes,
        step: int | None,
        clock: Callable[[], float],
    ) -> Exported:
        started = time.perf_counter()
        manifest = read_manifest(checkpoint)
        step = manifest.global_step if step is None else step
        every = serving_tables(checkpoint)
        wanted = {feature.table for feature in self._features.values()}
        if not wanted <= every.keys():
            raise CheckpointError(f"{checkpoint}: has tables {sorted(every)}; the model needs {sorted(wanted)}")
        tables = {table: every[table] for table in sorted(wanted)}
        model = ModelConfig(
            name=self._name,
            features=self._features,
            inputs=self._inputs,
            outputs=self._outputs,
            tables=tuple(tables.values()),
            num_ps=manifest.shard_count,
        )
        if self._load is None:
            set_parameters(self._dense, dense_values(checkpoint))
        else:
            self._load(checkpoint)
        graphs, weights, signatures = self._trace(model)
        model = replace(model, signatures=signatures)
        version = new_version(base, clock=clock)
        root = base if mode == "standalone" else Folder(base).child(ENTRY).url
        folder = Folder(root).child(str(version))
        about = {
            "version": version,
            "mode": mode,
            "step": step,
            "checkpoint": Folder(checkpoint).url,
            # Every change acknowledged before the first part began is inside.
            "checkpoint_unix_s": manifest.as_of_unix_s,
            "created_unix_s": clock(),
        }
        shards = 0 if mode == "standalone" or dense_only else manifest.shard_count
        parts = [Folder(ps_base(base, shard)).child(str(version)) for shard in range(shards)]
        with _gone_if_it_fails([folder, *parts]):
            files = write_model(folder, model, graphs, pack_weights(weights), warm_up=warm_up)
            rows = write_serving_rows(checkpoint, folder.child(ROWS).url, tables) if mode == "standalone" else 0
            for shard, part in enumerate(parts):
                rows += write_serving_rows(checkpoint, part.child(ROWS).url, tables, index=shard, count=shards)
                write_manifest(part, ExportManifest(shard=shard, **about))  # type: ignore[arg-type]
            write_manifest(folder, ExportManifest(files=files, **about))  # type: ignore[arg-type]
        prune_versions(root, keep, [] if mode == "standalone" else ps_bases(base), but=[_pinned(base)])
        log.info(
            "exported",
            extra={
                "path": folder.url,
                "step": step,
                "rows": rows,
                "seconds": round(time.perf_counter() - started, 3),
            },
        )
        return Exported(version=version, path=folder.url, step=step, rows=rows)

    def _trace(self, model: ModelConfig) -> tuple[dict[str, bytes], dict[str, Tensor], dict[str, Signature]]:
        """Graphs by signature, all their weights, and what the further signatures are."""
        if self._traced is None:
            shapes = model.shapes()
            traced = export_program(self._module, shapes)
            # What no entry could load is found out here.
            check_program(*traced, self._outputs, shapes, where=f"{type(self._module).__name__}: the graph")
            self._others = {
                name: self._signature(name, module, tuple(outputs), shapes)
                for name, (module, outputs) in self._signatures.items()
            }
            self._traced = traced
        graph, first = self._traced
        weights = join_weights(
            current_weights(self._module, first),
            {name: current_weights(self._signatures[name][0], own) for name, (_, _, own) in self._others.items()},
        )
        graphs = {SERVING_DEFAULT: graph} | {name: other for name, (_, other, _) in self._others.items()}
        return graphs, weights, {name: signature for name, (signature, _, _) in self._others.items()}

    def _signature(
        self, name: str, module: nn.Module, outputs: tuple[str, ...], shapes: Sequence[Sequence[int]]
    ) -> tuple[Signature, bytes, dict[str, Tensor]]:
        """The program of a further signature, of the inputs that it has a use for."""
        try:
            whole = export_program(module, shapes)
            kept = used_inputs(whole[0]) or [0]
            if len(kept) < len(shapes):
                with only_inputs(module, shapes, kept):
                    whole = export_program(module, [shapes[place] for place in kept])
        except InvalidRequestError as error:
            raise InvalidRequestError(f"signature {name!r}: {error}") from error
        where = f"signature {name!r}: the graph"
        check_program(*whole, outputs, [shapes[place] for place in kept], where=where)
        return Signature(inputs=tuple(self._inputs[place] for place in kept), outputs=outputs), *whole


@contextmanager
def _gone_if_it_fails(folders: Sequence[Folder]) -> Iterator[None]:
    """Leave nothing of a version that could not be written: without its manifest nobody would ever remove it."""
    try:
        yield
    except BaseException:
        for folder in folders:
            with suppress(Exception):  # the disk may be what failed; what is said is the first failure
                folder.remove_all()
        raise


def _pinned(base: str) -> int:
    """The version that entries are pinned to; 0: none, or nobody can tell."""
    try:
        return read_published(base).pinned
    except CheckpointError as error:
        log.warning("%s", error)
        return 0


def _check_stored(module: nn.Module, dense: nn.Module) -> None:
    """Refuse a module with more than checkpoints hold: it would be exported as it was made, not as it was trained."""
    kept = module.state_dict(keep_vars=True)
    names = {name for name, _ in module.named_buffers()}
    buffers = [name for name in kept if name in names and kept[name].is_floating_point()]
    if buffers:
        raise InvalidRequestError(
            f"{type(module).__name__} has buffers {buffers}: checkpoints do not hold buffers, so what training makes "
            "of them would be missing in the export; register_buffer(..., persistent=False) says that one never changes"
        )
    stored = {id(each) for each in dense.parameters()}
    others = [name for name, each in module.named_parameters() if each.requires_grad and id(each) not in stored]
    if others:
        raise InvalidRequestError(
            f"{type(module).__name__} has parameters {others} beside those of dense, {type(dense).__name__}: their "
            "values are in no checkpoint; requires_grad_(False) says that they are as they shall be exported"
        )


def find_checkpoint(path: str) -> str:
    """`path` if it is a checkpoint, or its newest complete one if it is a directory of them.

    Raises:
        CheckpointError: There is none.
    """
    newest = newest_complete(path)
    if newest is not None:
        return newest.path
    read_manifest(path)
    return path
