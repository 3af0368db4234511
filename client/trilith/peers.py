"""PeerClient: the client of a cluster without PS, whose shards are in the workers themselves; rows travel by exchange.

It stands where `trilith.Client` stands: modules and trainers look rows up and push gradients without knowing which of
the two they have. Every rank makes the same calls in the same order, with ids of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from trilith.arrays import as_ids, as_rows, as_values, refuse_non_finite
from trilith.batches import TableInfo, UpdateVerb, WriteOptions
from trilith.client import Client
from trilith.cluster import Rejoined
from trilith.connect import open_part
from trilith.errors import (
    CheckpointError,
    ClosedError,
    ClusterMismatchError,
    InvalidRequestError,
    NonFiniteError,
    TrilithError,
    UnknownVariableError,
)
from trilith.ops.reorder import EMPTY_FROM
from trilith.pipelining import Pusher
from trilith.queues import Queues
from trilith.routing import partition_owner, partition_sizes
from trilith.rows import Table
from trilith.runtime.extras import need
from trilith.runtime.forks import keep_for_ever, renew_in_children
from trilith.shard import DensePart, Float32Array, UInt64Array, VariablePiece, Write
from trilith.steps import as_step
from trilith.tables.initial import InitialRows, Missing, check_missing
from trilith_proto import hash_table_pb2, ps_pb2

if TYPE_CHECKING:
    from trilith.ops.reorder import FusedReorder
    from trilith.tables.all_to_all import AllToAllTables, Collective, Returned
    from trilith.tables.spec import TableSpec

__all__ = ["PeerBatches", "PeerClient", "connect_peers"]

_T = TypeVar("_T")


def connect_peers(
    device: str = "cpu", *, float16: bool = False, threads: int | None = None, update_queue: int = 0
) -> PeerClient:
    """Make a cluster of the ranks of torch.distributed's default group, which must be up.

    Args:
        device: Where the group's backend wants tensors: "cpu" for gloo, "cuda" for NCCL.
        float16: Whether rows and gradients travel as float16.
        threads: Of this rank's engine; None: one per core.
        update_queue: Updates that may wait at their owners; see `PeerClient`.
    """
    need("torch", extra="torch")
    from trilith.tables.all_to_all import TorchCollective

    def exchange(rows: bool) -> TorchCollective:
        return TorchCollective.in_new_group(device, float16=float16 and rows)

    return PeerClient(exchange, float16=float16, threads=threads, update_queue=update_queue)


class _OwnRows:
    """This rank's rows: ids come routed, and rows checked."""

    def __init__(self, client: Client) -> None:
        self._batches = client.batches()

    def lookup(self, ids: Mapping[str, Any], /) -> dict[str, Float32Array]:
        plain = {name: np.ascontiguousarray(each).view(np.uint64) for name, each in ids.items()}
        return self._batches.lookup_owned([plain], None)[0]

    def apply_gradients(self, updates: Mapping[str, tuple[Any, ...]], /, **options: Any) -> None:
        self._update("apply_gradients", updates, **options)

    def assign(self, updates: Mapping[str, tuple[Any, ...]], /, **options: Any) -> None:
        self._update("assign", updates, **options)

    def assign_add(self, updates: Mapping[str, tuple[Any, ...]], /, **options: Any) -> None:
        self._update("assign_add", updates, **options)

    def _update(
        self,
        verb: UpdateVerb,
        updates: Mapping[str, tuple[Any, ...]],
        *,
        request_time: int | None,
        global_step: int = 0,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        plain = {name: (each[0].view(np.uint64), *each[1:]) for name, each in updates.items()}
        options = WriteOptions(global_step, request_time, allow_non_finite=True, rate_factors=rate_factors or {})
        self._batches.update_owned(verb, [plain], options)


class _Exchanges(NamedTuple):
    """The same tables by three exchanges, for a thread each."""

    lookups: AllToAllTables
    updates: AllToAllTables
    assigns: AllToAllTables


class PeerBatches:
    """The verbs of `trilith.batches.Batches` by exchange, for tables and fused layouts; a shard is an owner.

    An exchange waits for as long as its process group does, so that calls take no deadline.
    """

    def __init__(self, peers: PeerClient) -> None:
        """Use `PeerClient.batches`."""
        self._peers = peers

    def lookup(self, ids: Mapping[str, Any], timeout_s: float | None) -> dict[str, Float32Array]:
        """See `PeerClient.lookup`."""
        _refuse_deadline(timeout_s)
        return self._peers.lookup(ids)

    def lookup_owned(
        self, ids: Sequence[Mapping[str, UInt64Array]], timeout_s: float | None
    ) -> list[dict[str, Float32Array]]:
        """Rows of ids that are arranged by owner: per owner and table float32[n, dim]."""
        _refuse_deadline(timeout_s)
        return self._peers.lookup_owned(ids)

    def update(self, verb: UpdateVerb, updates: Mapping[str, tuple[Any, Any]], options: WriteOptions) -> None:
        """See `PeerClient.apply_gradients`, `assign` and `assign_add`."""
        _refuse_deadline(options.timeout_s)
        self._peers.update(verb, updates, options)

    def update_owned(
        self, verb: UpdateVerb, updates: Sequence[Mapping[str, tuple[Any, Any]]], options: WriteOptions
    ) -> None:
        """Write rows of ids that are arranged by owner; repeats are applied one after another."""
        _refuse_deadline(options.timeout_s)
        self._peers.update_owned(verb, updates, options)


class _Elsewhere:
    """Stands for what another process has: whatever is asked of it is ClosedError."""

    def __init__(self, why: str) -> None:
        self._why = why

    def close(self) -> None:
        """Nothing is here to be closed."""

    def __getattr__(self, name: str) -> Any:
        raise ClosedError(self._why)


class PeerClient:
    """The shards of all ranks together; see `trilith.Client` for the verbs.

    Lookups, gradients, other writes and everything else may come from four threads: each kind has exchanges of its own.
    An update is one step per id and rank, in the order of the ranks, as if the workers of a cluster of PS had come one
    by one. What a rank refuses counts as nothing said: the others go on.

    With `update_queue`, gradients that have travelled wait at their owner for a thread that applies them: rows then
    lack up to so many updates more. `drain` waits for them; a checkpoint has them.

    Args:
        collective: Makes an exchange; called five times, with True where rows travel, the rest is exact.
        float16: Whether exchanges of rows narrow them, which must not make them infinite.
        threads: Of this rank's engine; None: one per core.
        update_queue: Updates that may wait at this rank; 0 applies them before a call returns.
    """

    def __init__(
        self,
        collective: Callable[[bool], Collective],
        *,
        float16: bool = False,
        threads: int | None = None,
        update_queue: int = 0,
    ) -> None:
        kinds = (False, True, True, True, False)
        self._asking, self._lookups, self._updates, self._assigns, self._control = map(collective, kinds)
        self.rank, self.ranks = self._control.rank, self._control.size
        self._spared = int(self.ranks >= EMPTY_FROM)  # rank 0 has the rest to do
        self.shards = self.ranks - self._spared
        """How many ranks own rows."""
        self._index = self.rank - self._spared
        """This rank's number among the owners; -1 owns nothing."""
        self._client, self._shard = open_part(max(self._index, 0), self.shards, threads=threads)
        self._float16 = float16
        self._pusher = Pusher(update_queue)
        self._step = 0
        self.features: dict[str, str] = {}
        """Name of its table by feature, as recorded through this client."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._specs: dict[str, TableSpec] = {}
        self._exchanges: _Exchanges | None = None
        self._process = os.getpid()
        renew_in_children(self)

    def __reduce__(self) -> Any:
        """Refuse to be pickled."""
        raise InvalidRequestError("the rows are in the ranks' processes, so their client cannot be pickled")

    def __deepcopy__(self, memo: dict[int, Any]) -> PeerClient:
        """The client itself: copies of a model look at the same rows."""
        return self

    def after_fork(self) -> None:
        """Rows and exchanges stay with the rank that was forked."""
        there: Any = _Elsewhere(
            f"rank {self.rank} of this cluster is process {self._process}; one that was forked from it has no part in"
            " its exchanges: look rows up there, in the batches' order"
        )
        keep_for_ever(self._asking, self._lookups, self._updates, self._assigns, self._control, self._exchanges)
        self._asking = self._lookups = self._updates = self._assigns = self._control = there
        self._client = self._shard = self._exchanges = there

    # ---- tables ------------------------------------------------------------------------------------------------

    def table(self, name: str, **config: Any) -> Table:
        """Return a handle on a table, made if need be; keywords of `trilith.tables.table_config`."""
        from trilith.tables.spec import table_config

        if not config and name in self._specs:
            return Table(self, name)
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
        local = _OwnRows(self._client)
        self._exchanges = _Exchanges(
            AllToAllTables(local, dims, self._lookups, asking=self._asking),
            AllToAllTables(local, dims, self._updates, count_repeats=counting),
            AllToAllTables(local, dims, self._assigns),
        )
        return {spec.name: Table(self, spec.name) for spec in specs}

    def table_info(self, name: str) -> TableInfo:
        """What is known of a table, or UnknownTableError."""
        return self._client.table_info(name)

    def batches(self, *, float16: bool | None = None) -> PeerBatches:
        """What moves batches, for those that route ids themselves.

        Args:
            float16: Whether rows travel as float16: None, or as the exchange was opened.
        """
        if float16 not in (None, self._float16):
            raise InvalidRequestError(f"float16={float16}: this exchange was opened with float16={self._float16}")
        return PeerBatches(self)

    def record_features(self, tables: Mapping[str, str]) -> None:
        """Only remembered: workers that hold the rows themselves keep no record of the cluster."""
        self.features.update(tables)

    @property
    def together(self) -> bool:
        """Whether the workers hold the rows and make the same calls together: yes."""
        return True

    @property
    def origin(self) -> object:
        """Equal for clients of the same rows, of which a rank has one."""
        return self

    @property
    def known_step(self) -> int:
        """The model's step."""
        return self._step

    def hear_step(self, step: int) -> None:
        """Know that the model is at `step` at least."""
        self._step = max(self._step, as_step(step))

    # ---- rows --------------------------------------------------------------------------------------------------

    def lookup(
        self, ids: Mapping[str, Any], *, missing: Missing = "zeros", timeout_s: float | None = None
    ) -> dict[str, Float32Array]:
        """Read rows, by table integers [n] to float32[n, dim]; see `Client.lookup`."""
        _refuse_deadline(timeout_s)
        if not check_missing(missing):
            return self.begin_lookup(ids)()
        initial = {name: InitialRows.of(self.table_info(name).config) for name in sorted(self._specs)}
        rows = self.begin_lookup(ids)()
        for name, begin in initial.items():  # on every rank, with ids or without
            wanted = as_ids(name, ids.get(name, ()))
            absent = np.flatnonzero(~self.contains(name, wanted))
            if absent.size:
                rows[name][absent] = begin.rows(wanted[absent], float16=self._float16)
        return rows

    def begin_lookup(self, ids: Mapping[str, Any]) -> Callable[[], dict[str, Float32Array]]:
        """Have the owners find rows; the call that is returned brings them, and may be made in another thread."""
        tables = self._tables().lookups
        asked = tables.ask(tables.reorder({name: as_ids(name, each).view(np.int64) for name, each in ids.items()}))

        def collect() -> dict[str, Float32Array]:
            rows = tables.collect(asked)
            return {name: rows[name] for name in ids}

        return collect

    def lookup_owned(self, ids: Sequence[Mapping[str, UInt64Array]]) -> list[dict[str, Float32Array]]:
        """Read rows of ids that are arranged by owner: per owner and table float32[n, dim]."""
        tables = self._tables().lookups
        self._check_parts(ids)
        asked: list[dict[str, Any]] = [{} for _ in range(self._spared)]
        asked += [{name: each.view(np.int64) for name, each in of_owner.items()} for of_owner in ids]
        found = tables.lookup_owned(asked)[self._spared :]
        return [{name: rows[name] for name in of_owner} for of_owner, rows in zip(ids, found, strict=True)]

    def apply_gradients(
        self,
        updates: Mapping[str, tuple[Any, Any]],
        *,
        global_step: int | None = None,
        advance: int = 0,
        rate_factors: Mapping[str, float] | None = None,
        request_time: int | None = None,
        allow_non_finite: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Take this rank's step of each distinct id, and those of the others of the ids that this rank owns.

        With `advance` every rank counts so many steps of the model, for itself. `rate_factors` are of the rows that
        this rank owns, and all ranks give the same.
        """
        from trilith.tables.schedules import as_factors

        step, advance = self._step if global_step is None else global_step, as_step(advance, "advance")
        options = WriteOptions(step, request_time, allow_non_finite, timeout_s, rate_factors=as_factors(rate_factors))
        self.update("apply_gradients", updates, options)
        self._step += advance

    def assign(
        self,
        updates: Mapping[str, tuple[Any, Any]],
        *,
        request_time: int | None = None,
        allow_non_finite: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Set weights, (ids, rows) by table; of an id that several give, the last row of the highest rank stays."""
        self.update("assign", updates, WriteOptions(self._step, request_time, allow_non_finite, timeout_s))

    def assign_add(
        self,
        updates: Mapping[str, tuple[Any, Any]],
        *,
        request_time: int | None = None,
        allow_non_finite: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Add to weights, (ids, rows) by table, one after another and rank after rank."""
        self.update("assign_add", updates, WriteOptions(self._step, request_time, allow_non_finite, timeout_s))

    def update(self, verb: UpdateVerb, updates: Mapping[str, tuple[Any, Any]], options: WriteOptions) -> None:
        """One of the three writes above."""
        _refuse_deadline(options.timeout_s)
        if verb == "apply_gradients":
            self._apply(updates, options)
            return
        tables = self._tables().assigns

        def route() -> list[dict[str, tuple[Any, Any]]]:
            return tables.route({name: self._checked(verb, name, *each, options) for name, each in updates.items()})

        self._write(verb, tables, route, options)

    def update_owned(
        self, verb: UpdateVerb, updates: Sequence[Mapping[str, tuple[Any, Any]]], options: WriteOptions
    ) -> None:
        """Write rows of ids that are arranged by owner; repeats are applied one after another."""
        tables = self._tables().updates if verb == "apply_gradients" else self._tables().assigns

        def check() -> list[dict[str, tuple[Any, Any]]]:
            self._check_parts(updates)
            return [{}] * self._spared + [
                {name: self._checked(verb, name, *each, options) for name, each in of_owner.items()}
                for of_owner in updates
            ]

        self._write(verb, tables, check, options)

    def _write(
        self,
        verb: UpdateVerb,
        tables: AllToAllTables,
        prepare: Callable[[], list[dict[str, tuple[Any, Any]]]],
        options: WriteOptions,
    ) -> None:
        """Send rows to their owners, each for all its places."""
        nothing: list[dict[str, tuple[Any, Any]]] = [{} for _ in range(self.ranks)]
        routed, refused = _prepared(prepare, nothing)
        returned = tables.send_owned(routed)
        if verb == "apply_gradients":
            self._take(tables, returned, options)
        else:
            self._pusher.drain()
            tables.take(returned, verb, request_time=options.request_time)
        if refused is not None:
            raise refused

    def _apply(self, updates: Mapping[str, tuple[Any, Any]], options: WriteOptions) -> None:
        """Send the sum of each id's gradients to its owner."""
        tables = self._tables().updates

        def add_up() -> tuple[FusedReorder, Float32Array]:
            given = {name: self._checked("apply_gradients", name, *each, options) for name, each in updates.items()}
            reorder = tables.reorder({name: ids for name, (ids, _) in given.items()})
            sums = tables.add_up({name: grads for name, (_, grads) in given.items()}, reorder)
            if not options.allow_non_finite and not self._sendable(sums):
                raise NonFiniteError(
                    "the sum of a repeated id's gradients is not finite, or float16 on the wire cannot hold it;"
                    " allow_non_finite=True sends it all the same"
                )
            return reorder, sums

        (reorder, sums), refused = _prepared(add_up, (tables.reorder({}), np.empty(0, np.float32)))
        self._take(tables, tables.send_back(sums, tables.send_ids(reorder)), options)
        if refused is not None:
            raise refused

    def _take(self, tables: AllToAllTables, returned: Returned, options: WriteOptions) -> None:
        given: dict[str, Any] = {"global_step": options.step, "request_time": options.request_time}
        if options.rate_factors:
            given["rate_factors"] = options.rate_factors
        self._pusher.push(lambda: tables.take(returned, **given))

    def _check_parts(self, given: Sequence[Any]) -> None:
        if len(given) != self.shards:
            raise InvalidRequestError(f"{len(given)} parts of a batch for {self.shards} owners")

    def _checked(self, verb: UpdateVerb, name: str, ids: Any, values: Any, options: WriteOptions) -> tuple[Any, Any]:
        wanted, what = as_ids(name, ids).view(np.int64), "gradients" if verb == "apply_gradients" else "values"
        rows = as_rows(name, what, values, wanted.size, self.table_info(name).dim)
        if not options.allow_non_finite and not self._sendable(rows):
            refuse_non_finite(f"table {name!r}", what, rows, float16=self._float16)
        return wanted, rows

    def _sendable(self, rows: Float32Array) -> bool:
        """Whether rows are finite where they arrive."""
        with np.errstate(over="ignore"):
            return bool(np.isfinite(rows.astype(np.float16) if self._float16 else rows).all())

    def reinitialize(
        self, table: str, ids: Any, *, request_time: int | None = None, timeout_s: float | None = None
    ) -> npt.NDArray[np.int8]:
        """Reset rows, rank after rank; int8[n] in the order of this rank's ids: 1 existed, 0 was created."""

        def reset(name: str, some: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
            return self._client.reinitialize(name, some.view(np.uint64), request_time=request_time)

        return self._by_owners(table, ids, reset, timeout_s)

    def contains(self, table: str, ids: Any, *, timeout_s: float | None = None) -> npt.NDArray[np.bool_]:
        """bool[n]: whether each id has a row."""

        def look(name: str, some: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
            return self._client.contains(name, some.view(np.uint64)).astype(np.int8)

        return self._by_owners(table, ids, look, timeout_s).astype(np.bool_)

    def erase(self, table: str, ids: Any, *, timeout_s: float | None = None) -> int:
        """Delete rows, rank after rank; returns how many of this rank's ids had one then."""

        def delete(name: str, some: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
            there = self._client.contains(name, some.view(np.uint64))
            self._client.erase(name, some.view(np.uint64))
            return there.astype(np.int8)

        return int(self._by_owners(table, np.unique(as_ids(table, ids)), delete, timeout_s).sum())

    def _by_owners(
        self,
        table: str,
        ids: Any,
        call: Callable[[str, npt.NDArray[np.int64]], npt.NDArray[np.int8]],
        timeout_s: float | None,
    ) -> npt.NDArray[np.int8]:
        """Have every owner do something with the rows of some ids; what each gave, in the order of this rank's ids."""
        _refuse_deadline(timeout_s)
        self.table_info(table)
        tables = self._tables().assigns
        self._pusher.drain()
        return tables.reinitialize(table, as_ids(table, ids).view(np.int64), call)

    def evict(
        self, tables: Sequence[str] | None = None, *, now: int | None = None, timeout_s: float | None = None
    ) -> dict[str, int]:
        """Delete expired rows on every rank; see `Client.evict`."""
        return self._counted(tables, lambda names: self._client.evict(names, now=now), timeout_s)

    def clear(self, tables: Sequence[str] | None = None, *, timeout_s: float | None = None) -> dict[str, int]:
        """Drop every row of tables on every rank; see `Client.clear`."""
        return self._counted(tables, self._client.clear, timeout_s)

    def _counted(
        self, tables: Sequence[str] | None, call: Callable[[Sequence[str]], dict[str, int]], timeout_s: float | None
    ) -> dict[str, int]:
        _refuse_deadline(timeout_s)
        if isinstance(tables, str):
            raise InvalidRequestError(f"tables={tables!r} is a string, it must be a sequence of names")
        names = sorted(self._specs) if tables is None else list(tables)
        for name in names:
            self.table_info(name)
        self.drain()
        counts = call(names) if self._index >= 0 else {}
        return dict(zip(names, self._sum_counts([counts.get(name, 0) for name in names]), strict=True))

    def count_rows(self, table: str, *, timeout_s: float | None = None) -> int:
        """Rows of a table on all ranks, which all ask."""
        _refuse_deadline(timeout_s)
        self.table_info(table)
        self.drain()
        mine = [each.rows for reply in self.stats() for each in reply.tables if each.table == table]
        return self._sum_counts([sum(mine)])[0]

    def _sum_counts(self, counts: Sequence[int]) -> list[int]:
        """The sum of all ranks' whole numbers, on every rank."""
        sizes = np.full(self.ranks, len(counts), np.int64)
        came = self._control.all_to_all(np.tile(np.array(counts, np.int64), self.ranks), sizes, sizes)
        return [int(each) for each in came.reshape(self.ranks, len(counts)).sum(axis=0)]

    def lookup_entries(self, table: str, ids: Any, *, timeout_s: float | None = None) -> list[bytes]:
        """Not offered: rows with their optimizer state stay with their ranks."""
        raise _only_in_checkpoints("lookup_entries")

    def dump_entries(self, table: str, *, page: int = 1000, timeout_s: float | None = None) -> Iterator[bytes]:
        """Not offered: rows with their optimizer state stay with their ranks."""
        raise _only_in_checkpoints("dump_entries")

    def describe(self, *, timeout_s: float | None = None) -> list[ps_pb2.DescribeResponse]:
        """Identity and content of this rank's shard."""
        _refuse_deadline(timeout_s)
        return self._client.describe() if self._index >= 0 else []

    def rejoin(self, *, recreate_tables: bool = False) -> list[Rejoined]:
        """Nothing to do: a rank that ends, ends the group."""
        return []

    def retry(self, error: TrilithError, *, timeout_s: float | None = None) -> None:
        """Not offered: an exchange reaches all ranks or ends them."""
        raise InvalidRequestError("retry: an exchange between ranks cannot be sent again; restore() a checkpoint")

    def variables(self, *, timeout_s: float | None = None) -> dict[str, tuple[int, ...]]:
        """Shapes of all dense variables by name."""
        return dict(self._shapes)

    def drain(self) -> None:
        """Wait until all updates that have travelled to this rank have been applied."""
        self._pusher.drain()

    def _tables(self) -> _Exchanges:
        if self._exchanges is None:
            raise InvalidRequestError("there are no tables yet")
        return self._exchanges

    # ---- dense variables and the step --------------------------------------------------------------------------

    def create_variables(
        self, initial: Mapping[str, Any], *, optimizer: Any, timeout_s: float | None = None
    ) -> dict[str, bool]:
        """Have the owners keep values that all ranks hold; existing ones stay. By name, whether it is new here."""
        _refuse_deadline(timeout_s)
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

    def pull_variables(
        self, names: Sequence[str] | None = None, *, timeout_s: float | None = None
    ) -> tuple[dict[str, Float32Array], int]:
        """Present values by name, on every rank, and the step."""
        _refuse_deadline(timeout_s)
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

    def assign_variables(
        self, values: Mapping[str, Any], *, allow_non_finite: bool = False, timeout_s: float | None = None
    ) -> None:
        """Set values; every rank gives the same."""
        _refuse_deadline(timeout_s)
        arrays = {name: as_values(name, "values", value) for name, value in values.items()}
        for name, value in arrays.items():
            if not allow_non_finite and not np.isfinite(value).all():
                refuse_non_finite(f"variable {name!r}", "values", value, float16=False)
        self._shard.assign_variables(self._own(arrays), Write(allow_non_finite=allow_non_finite))

    def apply_dense_gradients(
        self,
        gradients: Mapping[str, Any],
        *,
        learning_rate: float | None = None,
        global_step: int | None = None,
        advance: int = 0,
        allow_non_finite: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Not offered: ranks step dense variables themselves."""
        raise InvalidRequestError(
            "apply_dense_gradients: ranks step dense parameters themselves, with trilith.nn.AllReduced"
        )

    @property
    def queues(self) -> Queues:
        """Not offered: queues are on PS."""
        raise InvalidRequestError("queues are kept by PS; deal files to ranks with Dataset.shard(rank, ranks)")

    @property
    def addresses(self) -> list[str]:
        """None: no PS is asked."""
        return []

    def _own(self, values: Mapping[str, Float32Array]) -> list[DensePart]:
        """The partitions that this rank keeps, as views."""
        parts = []
        for name, value in values.items():
            flat, start = value.reshape(-1), 0
            for partition, size in enumerate(partition_sizes(flat.size, self.shards)):
                if partition_owner(name, partition, self.shards) == self._index:
                    parts.append(DensePart(name, partition, flat[start : start + size]))
                start += size
        return parts

    def _sum(self, values: Float32Array) -> Float32Array:
        """The sum of all ranks' arrays, on every rank."""
        each = np.full(self.ranks, values.size, np.int64)
        came = self._control.all_to_all(np.tile(values, self.ranks), each, each)
        total: Float32Array = came.reshape(self.ranks, values.size).sum(axis=0, dtype=np.float32)
        return total

    def global_step(
        self, *, advance: int | None = None, set_to: int | None = None, timeout_s: float | None = None
    ) -> int:
        """The step, which every rank counts for itself, after advancing or setting it."""
        self._step = self._step + (advance or 0) if set_to is None else set_to
        return self._step

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def save(self, path: str, *, timeout_s: float | None = None) -> int:
        """Write a checkpoint, the same as a cluster of as many PS would; rank 0's `path` counts. Returns its step.

        Raises:
            CheckpointError: Another rank could not write its part; where it is this one, its own error is raised.
        """
        _refuse_deadline(timeout_s)
        from trilith.checkpoint import collect_parts, write_manifest
        from trilith.folder import Folder, absolute

        where = self._from_first(absolute(path))

        def write_rows() -> None:
            self.drain()
            if self._index >= 0:
                self._shard.global_step(set_to=self._step)
                self._client.save_shards(where)

        def write_whole() -> None:
            if self.rank == 0:
                parts = collect_parts(Folder(where), self.shards)
                assert parts is not None  # everyone has written its own
                write_manifest(where, parts)

        self._alike(write_rows, f"its part of {where}")
        self._alike(write_whole, f"the manifest of {where}")
        return self._step

    def restore(
        self,
        path: str,
        *,
        variables: Mapping[str, Sequence[VariablePiece]] | None = None,
        step: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Replace the content by that of a checkpoint of any number of shards; rank 0's `path` counts.

        `variables` and `step`: as of `Client.restore`; all ranks give the same.
        """
        _refuse_deadline(timeout_s)
        from trilith.checkpoint import read_manifest
        from trilith.folder import absolute

        where = self._from_first(absolute(path))
        self.drain()
        if self._index >= 0:
            self._client.restore(where, variables=variables, step=step)
        self._step = read_manifest(where).global_step if step is None else step
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

    def stats(self, *, timeout_s: float | None = None) -> list[ps_pb2.StatsResponse]:
        """Counters and sizes of this rank's shard."""
        _refuse_deadline(timeout_s)
        return self._client.stats() if self._index >= 0 else []

    def close(self) -> None:
        """Release this rank's shard; drain first to lose nothing."""
        self._pusher.close()
        self._client.close()
        for each in (self._asking, self._lookups, self._updates, self._assigns, self._control):
            each.close()

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
        data = np.frombuffer(bytearray(text.encode()), np.uint8) if self.rank == 0 else np.empty(0, np.uint8)
        each = np.ones(self.ranks, np.int64)
        sizes = self._control.all_to_all(np.full(self.ranks, data.size, np.int64), each, each)
        sent = np.full(self.ranks, data.size, np.int64)
        return bytes(self._control.all_to_all(np.tile(data, self.ranks), sent, sizes)).decode()

    def _alike(self, write: Callable[[], None], what: str) -> None:
        """Write something on every rank; where that fails on one it fails on all, when all have tried."""
        _, failed = _prepared(write, None)
        ranks = self._control.all_to_all(
            np.full(self.ranks, failed is not None, np.int64), *[np.ones(self.ranks, np.int64)] * 2
        )
        if failed is not None:
            raise failed
        if ranks.any():
            raise CheckpointError(f"rank {int(np.argmax(ranks))} could not write {what}")

    def _wait(self) -> None:
        """Return when every rank has come here."""
        self._from_first("")


def _prepared(prepare: Callable[[], _T], nothing: _T) -> tuple[_T, Exception | None]:
    """What to send; nothing, and the error to raise afterwards, if this rank's call is no good: the others wait."""
    try:
        return prepare(), None
    except Exception as error:  # noqa: BLE001 - raised by the caller, after its part of the exchange
        return nothing, error


def _only_in_checkpoints(verb: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{verb}: among ranks rows travel without their state; save() a checkpoint and restore it into local:// or PS"
    )


def _refuse_deadline(timeout_s: float | None) -> None:
    if timeout_s is not None:
        raise InvalidRequestError(
            f"timeout_s={timeout_s}: an exchange waits for as long as its process group does; set it there"
        )
