"""PeerClient: the client of a cluster without PS, whose shards are in the workers themselves; rows travel by exchange.

It stands where `trilith.Client` stands: modules and trainers look rows up and push gradients without knowing which of
the two they have. Every rank makes the same calls in the same order, with ids of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from trilith.arrays import as_ids, as_rows, as_values, refuse_non_finite
from trilith.batches import Terms
from trilith.client import Client, Table
from trilith.connect import open_part
from trilith.errors import ClusterMismatchError, InvalidRequestError, UnknownVariableError
from trilith.ops.reorder import EMPTY_FROM
from trilith.routing import partition_owner, partition_sizes
from trilith.shard import ANY_WRITE, DensePart, Float32Array
from trilith_proto import hash_table_pb2, ps_pb2

if TYPE_CHECKING:
    from trilith.tables.all_to_all import AllToAllTables, Collective
    from trilith.tables.spec import TableSpec

__all__ = ["PeerClient", "connect_peers"]


def connect_peers(device: str = "cpu", *, float16: bool = False, threads: int | None = None) -> PeerClient:
    """Make a cluster of the ranks of torch.distributed's default group, which must be up.

    Args:
        device: Where the group's backend wants tensors: "cpu" for gloo, "cuda" for NCCL.
        float16: Whether rows and gradients travel as float16.
        threads: Of this rank's engine; None: one per core.
    """
    from trilith.tables.all_to_all import TorchCollective

    return PeerClient(lambda rows: TorchCollective.in_new_group(device, float16=float16 and rows), threads=threads)


class _Local:
    """This rank's rows: ids come routed, and each once."""

    def __init__(self, client: Client) -> None:
        self._batches = client.batches()

    def lookup(self, ids: Mapping[str, Any], /) -> dict[str, Float32Array]:
        plain = {name: np.ascontiguousarray(each).view(np.uint64) for name, each in ids.items()}
        return self._batches.lookup_owned([plain], None)[0]

    def apply_gradients(
        self,
        updates: Mapping[str, tuple[Any, ...]],
        /,
        **options: Any,
    ) -> None:
        plain = {name: (each[0].view(np.uint64), *each[1:]) for name, each in updates.items()}
        terms = Terms(options["global_step"], options["request_time"])
        self._batches.update_owned("apply_gradients", [plain], terms)


class PeerClient:
    """The shards of all ranks together; see `trilith.Client` for the verbs.

    Lookups, updates and everything else may come from three threads: each kind has an exchange of its own. An update is
    one step per id and rank, in the order of the ranks, as if the workers of a cluster of PS had come one by one.

    Args:
        collective: Makes an exchange; called three times, twice with True: rows travel there, the rest is exact.
        threads: Of this rank's engine; None: one per core.
    """

    def __init__(self, collective: Callable[[bool], Collective], *, threads: int | None = None) -> None:
        self._lookups, self._updates, self._control = (collective(rows) for rows in (True, True, False))
        self.rank, self.ranks = self._control.rank, self._control.size
        spared = int(self.ranks >= EMPTY_FROM)  # rank 0 has the rest to do
        self._owners = self.ranks - spared
        self._index = self.rank - spared
        """This rank's number among the owners; -1 owns nothing."""
        self._client, self._shard = open_part(max(self._index, 0), self._owners, threads=threads)
        self._step = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._specs: dict[str, TableSpec] = {}
        self._exchanges: tuple[AllToAllTables, AllToAllTables] | None = None

    # ---- tables ------------------------------------------------------------------------------------------------

    def table(self, name: str, **config: Any) -> Table:
        """Return a handle on a table, made if need be; keywords of `trilith.tables.table_config`."""
        from trilith.tables.spec import table_config

        if not config and name in self._specs:
            return Table(self, name)  # type: ignore[arg-type]
        return self.create_tables([table_config(name, **config)])[name]

    def create_tables(self, specs: Sequence[TableSpec]) -> dict[str, Table]:
        """Handles on tables, made if need be; every rank names the same ones."""
        from trilith.tables.all_to_all import AllToAllTables

        said = [spec.proto.SerializeToString(deterministic=True).hex() for spec in specs]
        if self._from_first(json.dumps(said)) != json.dumps(said):
            raise ClusterMismatchError(
                f"rank {self.rank} makes tables {[spec.name for spec in specs]}, rank 0 others or with other configs"
            )
        self._client.create_tables(specs)
        self._specs.update({spec.name: spec for spec in specs})
        dims = {name: spec.dim for name, spec in self._specs.items()}
        counting = any(spec.proto.filter != ps_pb2.TableConfig.NO_FILTER for spec in self._specs.values())
        local = _Local(self._client)
        self._exchanges = (
            AllToAllTables(local, dims, self._lookups),
            AllToAllTables(local, dims, self._updates, count_repeats=counting),
        )
        return {spec.name: Table(self, spec.name) for spec in specs}  # type: ignore[arg-type]

    def _info(self, name: str) -> Any:
        """What `Table` asks for."""
        return self._client._info(name)

    # ---- rows --------------------------------------------------------------------------------------------------

    def lookup(self, ids: Mapping[str, Any]) -> dict[str, Float32Array]:
        """Read rows, by table integers [n] to float32[n, dim]; zeros where an id has no row."""
        lookups, _ = self._tables()
        rows, _ = lookups.lookup(
            lookups.reorder({name: as_ids(name, each).view(np.int64) for name, each in ids.items()})
        )
        return {name: rows[name] for name in ids}

    def apply_gradients(
        self,
        updates: Mapping[str, tuple[Any, Any]],
        *,
        global_step: int | None = None,
        request_time: int | None = None,
        allow_non_finite: bool = False,
    ) -> None:
        """Take this rank's step of each distinct id, and those of the others of the ids that this rank owns."""
        _, tables = self._tables()
        ids, grads, refused = {}, {}, None
        try:
            for name, (wanted, values) in updates.items():
                ids[name] = as_ids(name, wanted).view(np.int64)
                grads[name] = as_rows(name, "gradients", values, ids[name].size, self._info(name).dim)
                if not allow_non_finite and not np.isfinite(grads[name]).all():
                    refuse_non_finite(f"table {name!r}", "gradients", grads[name], float16=False)
        except Exception as error:  # noqa: BLE001 - raised below: the others wait for this rank's part
            ids, grads, refused = {}, {}, error
        tables.apply_gradients(
            grads,
            tables.send_ids(tables.reorder(ids)),
            global_step=self._step if global_step is None else global_step,
            request_time=request_time,
        )
        if refused is not None:
            raise refused

    def assign_add(self, updates: Mapping[str, tuple[Any, Any]]) -> None:
        """Not offered, as no write but gradients is: load a checkpoint instead."""
        raise NotImplementedError("workers that hold the rows themselves exchange gradients only")

    assign = assign_add

    def _tables(self) -> tuple[AllToAllTables, AllToAllTables]:
        if self._exchanges is None:
            raise InvalidRequestError("there are no tables yet")
        return self._exchanges

    # ---- dense variables and the step --------------------------------------------------------------------------

    def create_variables(self, initial: Mapping[str, Any], *, optimizer: Any) -> dict[str, bool]:
        """Have the owners keep values that all ranks hold; existing ones stay. By name, whether it is new here."""
        config = optimizer if isinstance(optimizer, hash_table_pb2.OptimizerConfig) else optimizer.as_proto()
        values = {name: as_values(name, "values", value) for name, value in initial.items()}
        self._shapes.update({name: value.shape for name, value in values.items()})
        parts = self._own(values)
        specs = [
            ps_pb2.VariableSpec(name=part.name, partition=part.partition, size=part.values.size, optimizer=config)
            for part in parts
        ]
        created = dict.fromkeys(values, False)
        for part, new in zip(parts, self._shard.create_variables(specs, [part.values for part in parts]), strict=True):
            created[part.name] |= new
        return created

    def pull_variables(self, names: Sequence[str] | None = None) -> tuple[dict[str, Float32Array], int]:
        """Present values by name, on every rank, and the step."""
        wanted = sorted(self._shapes) if names is None else list(names)
        unknown = [name for name in wanted if name not in self._shapes]
        if unknown:
            raise UnknownVariableError(f"no variable {unknown[0]!r}; there are {sorted(self._shapes)}")
        found = {name: np.zeros(self._shapes[name], np.float32) for name in wanted}
        refs = [(part.name, part.partition, part.values) for part in self._own(found)]
        for (_, _, into), values in zip(refs, self._shard.pull_variables([ref[:2] for ref in refs])[0], strict=True):
            into[:] = values
        flat = np.concatenate([np.empty(0, np.float32), *(found[name].reshape(-1) for name in wanted)])
        total = self._sum(flat)
        pieces = np.split(total, np.cumsum([found[name].size for name in wanted])[:-1]) if wanted else []
        return {name: piece.reshape(self._shapes[name]) for name, piece in zip(wanted, pieces, strict=True)}, self._step

    def assign_variables(self, values: Mapping[str, Any]) -> None:
        """Set values; every rank gives the same."""
        parts = self._own({name: as_values(name, "values", value) for name, value in values.items()})
        self._shard.assign_variables(parts, ANY_WRITE)

    def _own(self, values: Mapping[str, Float32Array]) -> list[DensePart]:
        """The partitions that this rank keeps, as views."""
        parts = []
        for name, value in values.items():
            flat, start = value.reshape(-1), 0
            for partition, size in enumerate(partition_sizes(flat.size, self._owners)):
                if partition_owner(name, partition, self._owners) == self._index:
                    parts.append(DensePart(name, partition, flat[start : start + size]))
                start += size
        return parts

    def _sum(self, values: Float32Array) -> Float32Array:
        """The sum of all ranks' arrays, on every rank."""
        each = np.full(self.ranks, values.size, np.int64)
        came = self._control.all_to_all(np.tile(values, self.ranks), each, each)
        total: Float32Array = came.reshape(self.ranks, values.size).sum(axis=0, dtype=np.float32)
        return total

    def global_step(self, *, advance: int | None = None, set_to: int | None = None) -> int:
        """The step, which every rank counts for itself, after advancing or setting it."""
        self._step = self._step + (advance or 0) if set_to is None else set_to
        return self._step

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def save(self, path: str) -> int:
        """Write a checkpoint, the same as a cluster of as many PS would; rank 0's `path` counts. Returns its step."""
        from trilith.checkpoint import collect_parts, write_manifest
        from trilith.folder import Folder, absolute

        where = self._from_first(absolute(path))
        if self._index >= 0:
            self._shard.global_step(set_to=self._step)
            self._client.save_shards(where)
        self._wait()
        if self.rank == 0:
            parts = collect_parts(Folder(where), self._owners)
            assert parts is not None  # everyone has written its own
            write_manifest(where, parts)
        self._wait()
        return self._step

    def restore(self, path: str) -> int:
        """Replace the content by that of a checkpoint of any number of shards; rank 0's `path` counts."""
        from trilith.checkpoint import read_manifest
        from trilith.folder import absolute

        where = self._from_first(absolute(path))
        if self._index >= 0:
            self._client.restore(where)
        self._step = read_manifest(where).global_step
        self._wait()
        return self._step

    def restore_newest(self, directory: str) -> str:
        """Restore the newest complete checkpoint below `directory`, as rank 0 sees it; returns its path, or ""."""
        from trilith.checkpoint import newest_complete

        newest = newest_complete(directory) if self.rank == 0 else None
        path = self._from_first("" if newest is None else newest.path)
        if path:
            self.restore(path)
        return path

    def stats(self) -> list[ps_pb2.StatsResponse]:
        """Counters and sizes of this rank's shard."""
        return self._client.stats() if self._index >= 0 else []

    def close(self) -> None:
        """Release this rank's shard."""
        self._client.close()

    def __enter__(self) -> PeerClient:
        """Return the client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    # ---- agreement ---------------------------------------------------------------------------------------------

    def _from_first(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        data = np.frombuffer(text.encode(), np.uint8) if self.rank == 0 else np.empty(0, np.uint8)
        each = np.ones(self.ranks, np.int64)
        sizes = self._control.all_to_all(np.full(self.ranks, data.size, np.int64), each, each)
        sent = np.full(self.ranks, data.size, np.int64)
        return bytes(self._control.all_to_all(np.tile(data, self.ranks), sent, sizes)).decode()

    def _wait(self) -> None:
        """Return when every rank has come here."""
        self._from_first("")
