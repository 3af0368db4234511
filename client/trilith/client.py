"""Client: what a trainer holds; every verb of a cluster, whose arguments it checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trilith.arrays import as_ids
from trilith.batches import Batches, TableInfo, WriteOptions
from trilith.cluster import Cluster, Rejoined
from trilith.dense import Variables
from trilith.discovery import Directory
from trilith.discovery.members import Members
from trilith.discovery.record import ClusterRecord, RecordKeeper
from trilith.discovery.zk_url import redact
from trilith.errors import (
    CheckpointError,
    DeadlineExceededError,
    InvalidRequestError,
    ShardRestartedError,
    TrilithError,
    UnavailableError,
    UnknownTableError,
)
from trilith.ops.dedup import gather_values
from trilith.queues import Queues
from trilith.rows import Table
from trilith.shard import ANY_WRITE, Float32Array, Shard, UInt64Array, VariablePiece, Write
from trilith.steps import as_step
from trilith.tables.initial import InitialRows, Missing, check_missing
from trilith.times import whole_seconds
from trilith_proto import ps_pb2

if TYPE_CHECKING:
    from trilith.tables.spec import TableSpec

__all__ = ["Client", "Table"]

_Update = tuple[Any, Any]  # (ids, rows), array-likes


class Client:
    """A connection to a cluster; every method may be called from several threads.

    A write returns when every shard concerned has acknowledged it. Rows change one by one: a call that fails on one
    shard may have succeeded on another. Arrays are checked before anything is sent.
    """

    def __init__(self, cluster: Cluster, *, members: Members | None = None) -> None:
        """Use `trilith.connect`."""
        self._cluster = cluster
        self._members = members
        self.features: dict[str, str] = {}
        """Name of its table by feature, as recorded through this client."""
        self.opened_by: tuple[Callable[..., Client], tuple[Any, ...]] | None = None
        """What opens the same cluster elsewhere; None where the cluster is in this process."""
        self._tables: dict[str, TableInfo] = {}
        self._batches = self._new_batches(None)
        self._variables = Variables(cluster)
        self.queues = Queues(cluster)

    # ---- tables ------------------------------------------------------------------------------------------------------

    def table(self, name: str, **config: Any) -> Table:
        """Return a handle on a table, creating the table if the cluster does not have it.

        Args:
            name: Unique in the cluster.
            **config: Keywords of `trilith.tables.table_config`. Without any, the table must exist.

        Raises:
            TableExistsError: The table exists with another config; TableMismatchError if the cluster's record says so.
            UnknownTableError: No config was given and there is no such table.
            ShardRestartedError: Some shard has lost the table while others hold rows of it.
        """
        if not config:
            self.table_info(name)
            return Table(self, name)
        from trilith.tables import table_config

        return self.create_tables([table_config(name, **config)])[name]

    def create_tables(self, specs: Sequence[TableSpec]) -> dict[str, Table]:
        """Handles by name on several tables, created together if the cluster does not have them; see `table`."""
        names = [spec.name for spec in specs]
        if len(set(names)) < len(names):
            raise InvalidRequestError(f"tables {names}: each needs a name of its own")
        self._create([spec.proto for spec in specs])
        for spec in specs:
            self._tables[spec.name] = TableInfo(spec.proto, spec.dim, tuple(spec.learning_rates))
        return {name: Table(self, name) for name in names}

    def batches(self, *, float16: bool | None = None) -> Batches:
        """What moves this client's batches, for those that route ids themselves; `trilith.tables` stands on it.

        Args:
            float16: Whether rows travel as float16, where there is a wire; None: as the client was opened.
        """
        return self._batches if float16 is None else self._new_batches(float16)

    def _new_batches(self, float16: bool | None) -> Batches:
        """Over a network lookups are timed; within a process there is nothing on the way to look for."""
        if not self._cluster.remote:
            return Batches(self._cluster, self.table_info, float16=float16)
        from trilith.runtime.timers import LookupTimers

        timers = LookupTimers(self._cluster.config.model_name, self._cluster.count)
        return Batches(self._cluster, self.table_info, float16=float16, observe=timers.observe)

    @property
    def directory(self) -> Directory | None:
        """Where the PS are listed; None for an embedded cluster."""
        return self._members.directory if self._members is not None else None

    @property
    def together(self) -> bool:
        """Whether workers that hold the rows make the same calls together: no, each PS answers for itself."""
        return False

    @property
    def origin(self) -> object:
        """Equal for clients of the same rows: what they were opened by; embedded, the client itself."""
        return self if self.opened_by is None else self.opened_by[1][0]

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return self._cluster.count

    @property
    def addresses(self) -> list[str]:
        """host:port of every PS; none of an embedded cluster."""
        return self._cluster.addresses

    @property
    def known_step(self) -> int:
        """The model's step as this client last heard it."""
        return self._cluster.step

    def hear_step(self, step: int) -> None:
        """Know that the model is at `step` at least: for workers who take steps that another one counts."""
        self._cluster.hear_step(as_step(step))

    def _create(self, configs: Sequence[ps_pb2.TableConfig]) -> None:
        cluster = self._cluster
        self._check_record(configs)
        answers = cluster.describe()
        cluster.check_incarnations(answers)
        for config in configs:
            has = [any(table.name == config.name for table in answer.tables) for answer in answers]
            if any(has) and not all(has):
                self._refuse_half_lost(config.name, has)
        cluster.everywhere(
            lambda index, shard: shard.create_tables(configs, cluster.write(index)),
            timeout_s=cluster.config.create_timeout_s,
        )

    def _check_record(self, configs: Sequence[ps_pb2.TableConfig]) -> None:
        """Refuse a config that the cluster's record has otherwise: a PS that came back empty would take it."""
        if isinstance(self.directory, RecordKeeper) and (record := self.directory.read_record()) is not None:
            tables = {config.name: config for config in configs}
            record.check(ClusterRecord(num_ps=self._cluster.count, tables=tables), "this client")

    def record_features(self, tables: Mapping[str, str]) -> None:
        """Put the table of each feature into the cluster's record, where there is one.

        Args:
            tables: Name of its table by feature.

        Raises:
            ClusterMismatchError: A feature is recorded as of another table.
        """
        if isinstance(self.directory, RecordKeeper):
            self.directory.agree(ClusterRecord(num_ps=self._cluster.count, features=dict(tables)), "this client")
        self.features.update(tables)

    def _refuse_half_lost(self, name: str, has: Sequence[bool]) -> None:
        """A table with rows on one shard was once on all of them: where it is missing, rows were lost."""
        rows = self.count_rows(name)
        if rows:
            raise ShardRestartedError(
                f"table {name!r} has {rows} rows on other shards but is unknown to shard {has.index(False)}, which has"
                " lost them in a restart; restore a checkpoint, or clear the table on the other shards to begin anew"
            )

    def table_info(self, name: str) -> TableInfo:
        """What is known of a table, asked of the cluster at first; UnknownTableError if it has none."""
        info = self._tables.get(name)
        if info is not None:
            return info
        answers = self._cluster.describe()
        self._cluster.check_incarnations(answers, reading=True)
        for config in answers[0].tables:
            # A table of another client's making keeps the rates of its config.
            self._tables.setdefault(config.name, TableInfo(config, _dim(config), None))
        if name not in self._tables:
            raise UnknownTableError(f"no table {name!r}; this cluster has {sorted(self._tables)}")
        return self._tables[name]

    # ---- rows of many tables -----------------------------------------------------------------------------------------

    def lookup(
        self, ids: Mapping[str, Any], *, missing: Missing = "zeros", timeout_s: float | None = None
    ) -> dict[str, Float32Array]:
        """Read rows; one RPC per PS for all tables.

        Args:
            ids: By table, integers of any kind [n]; repeats allowed.
            missing: What an id without a row gives: "zeros", or "initial", what its row would begin with, at the cost
                of asking again for ids that seem to have none. The first step of a row is taken from there.
            timeout_s: Seconds until DeadlineExceededError; None takes the client's own.

        Returns:
            By table float32[n, dim], row i for ids[i]. Nothing is inserted.
        """
        if not check_missing(missing):
            return self._batches.lookup(ids, timeout_s)
        deadline = time.monotonic() + (self._cluster.config.timeout_s if timeout_s is None else timeout_s)
        initial = {name: InitialRows.of(self.table_info(name).config) for name in ids}
        rows = self._batches.lookup(ids, timeout_s)
        for name, found in rows.items():
            if not initial[name].zeros:
                self._fill_in(name, as_ids(name, ids[name]), found, initial[name], deadline)
        return rows

    def begin_lookup(self, ids: Mapping[str, Any]) -> Callable[[], dict[str, Float32Array]]:
        """A lookup whose rows the returned call brings; on PS they are found by that call too."""
        return partial(self.lookup, ids)

    def drain(self) -> None:
        """Nothing to wait for: what a PS has acknowledged, it has applied."""

    def _fill_in(self, name: str, ids: UInt64Array, rows: Float32Array, initial: InitialRows, deadline: float) -> None:
        """Put initial values in the place of rows that are missing; a row may have come since it was looked for."""
        empty = np.flatnonzero(~rows.any(axis=1))
        if not empty.size:
            return
        there = self.contains(name, ids[empty], timeout_s=max(deadline - time.monotonic(), 0.001))
        absent, come = empty[~there], empty[there]
        rows[absent] = initial.rows(ids[absent], float16=self._cluster.float16)
        if come.size:
            left = max(deadline - time.monotonic(), 0.001)
            rows[come] = self._batches.lookup({name: ids[come]}, left)[name]

    def apply_gradients(
        self,
        updates: Mapping[str, _Update],
        *,
        global_step: int | None = None,
        advance: int = 0,
        rate_factors: Mapping[str, float] | None = None,
        request_time: int | None = None,
        allow_non_finite: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Take one optimizer step per distinct id; one RPC per PS for all tables.

        Args:
            updates: By table (ids [n], float gradients [n, dim]); gradients of repeated ids are added up in float32,
                and occurrence thresholds count every repeat.
            global_step: The model's step, at which schedules are evaluated; None takes the step this client knows.
            advance: By how many steps the model goes on with this: PS 0 counts them when it applies its part, which is
                sent for that even if none of its rows are concerned, and answers where the counter is then.
            rate_factors: By table what its rates are multiplied by, in this step; those not named keep theirs.
            request_time: Whole Unix seconds, the rows' last update; None is now, by each shard's own clock. A time more
                than a day ahead of that clock is refused.
            allow_non_finite: Accept NaN and infinity.
            timeout_s: Seconds until DeadlineExceededError; None takes the client's own.

        Raises:
            NonFiniteError: A gradient, or a sum of them, is NaN or infinite; nothing was sent.
        """
        step = self._cluster.step if global_step is None else as_step(global_step)
        options = WriteOptions(
            step, request_time, allow_non_finite, timeout_s, as_step(advance, "advance"), _factors(rate_factors)
        )
        self._batches.update("apply_gradients", updates, options)

    def assign(
        self,
        updates: Mapping[str, _Update],
        *,
        request_time: int | None = None,
        allow_non_finite: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Set weights: by table (ids [n], float rows [n, dim]). Of a repeated id the last row stays."""
        options = WriteOptions(self._cluster.step, request_time, allow_non_finite, timeout_s)
        self._batches.update("assign", updates, options)

    def assign_add(
        self,
        updates: Mapping[str, _Update],
        *,
        request_time: int | None = None,
        allow_non_finite: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Add to weights: by table (ids [n], float rows [n, dim]), one after another."""
        options = WriteOptions(self._cluster.step, request_time, allow_non_finite, timeout_s)
        self._batches.update("assign_add", updates, options)

    def retry(self, error: TrilithError, *, timeout_s: float | None = None) -> None:
        """Send a write again that failed, to the shards that have not acknowledged it, as the same write.

        A shard that has done it does not do it twice. It is worth calling when the cause may be over: after
        DeadlineExceededError, UnavailableError, MemoryLimitError. What the write would have returned is not returned.

        Args:
            error: What the write raised; its `unfinished` says which shards have done it. Keep it no longer than that:
                it holds the write's rows.
            timeout_s: Seconds until DeadlineExceededError; None takes the client's own.

        Raises:
            InvalidRequestError: The error is not of a write that some shard may have done.
        """
        unfinished = getattr(error, "unfinished", None)  # of another library's error, too
        if unfinished is None:
            raise InvalidRequestError(f"{type(error).__name__} has no unfinished write: call what raised it again")
        unfinished.again(timeout_s)

    # ---- ids of one table --------------------------------------------------------------------------------------------

    def contains(self, table: str, ids: Any, *, timeout_s: float | None = None) -> npt.NDArray[np.bool_]:
        """bool[n]: whether each id has a row."""
        split, pieces = self._batches.per_id(
            table, ids, lambda shard, part, _: shard.contains(part), timeout_s=timeout_s
        )
        return gather_values(split, pieces, np.bool_)

    def reinitialize(
        self, table: str, ids: Any, *, request_time: int | None = None, timeout_s: float | None = None
    ) -> npt.NDArray[np.int8]:
        """Reset rows to their initial state, creating missing ones; int8[n]: 1 existed, 0 was created."""
        split, pieces = self._batches.per_id(
            table,
            ids,
            lambda shard, part, write: shard.reinitialize(part, write),
            options=WriteOptions(self._cluster.step, request_time),
            timeout_s=timeout_s,
        )
        return gather_values(split, pieces, np.int8)

    def lookup_entries(self, table: str, ids: Any, *, timeout_s: float | None = None) -> list[bytes]:
        """Per id a serialized EntryDump without its id, b"" where there is no row; see `trilith.describe_entry`."""
        split, pieces = self._batches.per_id(
            table, ids, lambda shard, part, _: shard.lookup_entries(part), timeout_s=timeout_s
        )
        entries = np.empty(split.ids.size, object)
        entries[:] = [entry for piece in pieces for entry in piece]
        return list(gather_values(split, [entries], np.object_))

    def erase(self, table: str, ids: Any, *, timeout_s: float | None = None) -> int:
        """Delete rows; returns how many there were."""
        _, pieces = self._batches.per_id(
            table,
            ids,
            lambda shard, part, write: shard.erase(part, write),
            options=WriteOptions(self._cluster.step),
            timeout_s=timeout_s,
        )
        return sum(pieces)

    def dump_entries(self, table: str, *, page: int = 1000, timeout_s: float | None = None) -> Iterator[bytes]:
        """Every row of a table as a serialized EntryDump with its id, shard by shard, up to `page` rows at a time.

        Of a table that is written to meanwhile some rows may be left out and others come twice, unlike with `save`.

        Args:
            table: Which table.
            page: Rows that one call brings at most.
            timeout_s: Seconds until DeadlineExceededError, of each page; None takes the client's own.

        Yields:
            Entries; see `trilith.describe_entry`.
        """
        self.table_info(table)
        for index in range(self._cluster.count):
            offset = 0
            while True:
                dumped = self._dump_page(table, index, page, offset, timeout_s)
                yield from dumped.entries
                offset = dumped.offset
                if offset == 0:
                    break

    def _dump_page(self, table: str, index: int, page: int, offset: int, timeout_s: float | None) -> Any:
        return self._cluster.fan_out(
            [index],
            lambda _, shard: shard.dump_entries(table, part=0, parts=1, limit=page, offset=offset),
            timeout_s=timeout_s,
        )[index]

    # ---- whole tables ------------------------------------------------------------------------------------------------

    def evict(
        self, tables: Sequence[str] | None = None, *, now: int | None = None, timeout_s: float | None = None
    ) -> dict[str, int]:
        """Delete expired rows.

        Args:
            tables: Names of tables; None: all of the cluster.
            now: Unix seconds to judge by, at most a day ahead of a shard's clock; None takes that clock itself.
            timeout_s: Seconds until DeadlineExceededError; None takes the client's own.

        Returns:
            Rows deleted by table.
        """
        at = 0 if now is None else whole_seconds(now, "now")
        if now is not None and at <= 0:
            raise InvalidRequestError(f"now={now} is no time; None judges by each shard's own clock")
        return self._counted(tables, lambda shard, names, write: shard.evict(names, write, now=at), timeout_s)

    def clear(self, tables: Sequence[str] | None = None, *, timeout_s: float | None = None) -> dict[str, int]:
        """Drop every row of tables.

        Args:
            tables: Names of tables; None: all of the cluster.
            timeout_s: Seconds until DeadlineExceededError; None takes the client's own.

        Returns:
            Rows dropped by table.
        """
        return self._counted(tables, lambda shard, names, write: shard.clear(names, write), timeout_s)

    def count_rows(self, table: str, *, timeout_s: float | None = None) -> int:
        """Rows of a table on all shards."""
        replies = self.stats(timeout_s=timeout_s)
        return sum(stats.rows for reply in replies for stats in reply.tables if stats.table == table)

    def _counted(
        self,
        tables: Sequence[str] | None,
        call: Callable[[Shard, Sequence[str], Write], Mapping[str, int]],
        timeout_s: float | None,
    ) -> dict[str, int]:
        if isinstance(tables, str):
            raise InvalidRequestError(f"tables={tables!r} is a string, it must be a sequence of names")
        cluster = self._cluster
        if tables is None:
            answers = cluster.describe()
            cluster.check_incarnations(answers)
            tables = [table.name for table in answers[0].tables]
        names = list(tables)
        for name in names:
            self.table_info(name)
        if not names:
            return {}
        writes = cluster.writes(global_step=cluster.step)
        replies = cluster.fan_out(
            range(cluster.count),
            lambda index, shard: call(shard, names, writes.of(index)),
            timeout_s=timeout_s,
            writes=True,
        )
        total: dict[str, int] = {}
        for counts in replies.values():
            for name, rows in counts.items():
                total[name] = total.get(name, 0) + rows
        return total

    # ---- dense variables and the step --------------------------------------------------------------------------------

    def create_variables(
        self, initial: Mapping[str, Any], *, optimizer: Any, timeout_s: float | None = None
    ) -> dict[str, bool]:
        """Create dense variables with initial values; existing ones keep theirs.

        Args:
            initial: By name, floats of any shape.
            optimizer: One of `trilith.tables`, or an OptimizerConfig; steps every variable on its PS.
            timeout_s: Seconds until DeadlineExceededError; None takes the client's own.

        Returns:
            By name, whether this call created it.
        """
        return self._variables.create(initial, optimizer, timeout_s)

    def pull_variables(
        self, names: Sequence[str] | None = None, *, timeout_s: float | None = None
    ) -> tuple[dict[str, Float32Array], int]:
        """Current values by name, float32 of the variable's shape (None: all variables), and the global step."""
        return self._variables.pull(names, timeout_s)

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
        """One step of each variable's optimizer.

        Args:
            gradients: By variable, float32 of its shape.
            learning_rate: None takes the optimizer's own.
            global_step: The model's step; None takes what this client knows.
            advance: As for `apply_gradients`; of a step that sends both, the last of them counts it.
            allow_non_finite: Accept NaN and infinity.
            timeout_s: Seconds until DeadlineExceededError; None takes the client's own.

        Raises:
            NonFiniteError: A gradient has NaN or infinity; nothing was sent.
        """
        self._variables.apply_gradients(
            gradients, learning_rate, global_step, allow_non_finite, timeout_s, advance=as_step(advance, "advance")
        )

    def assign_variables(
        self, values: Mapping[str, Any], *, allow_non_finite: bool = False, timeout_s: float | None = None
    ) -> None:
        """Set variables: by name float32 of its shape."""
        self._variables.assign(values, allow_non_finite, timeout_s)

    def variables(self, *, timeout_s: float | None = None) -> dict[str, tuple[int, ...]]:
        """Shapes of all dense variables by name, whoever created them.

        One whose creator did not give its shape, as older checkpoints have them, is flat, (n,).
        """
        return self._variables.shapes(timeout_s)

    def global_step(
        self, *, advance: int | None = None, set_to: int | None = None, timeout_s: float | None = None
    ) -> int:
        """Read the model's step counter (PS 0 keeps it), after advancing or setting it."""
        if advance is not None and set_to is not None:
            raise InvalidRequestError(f"advance={advance} and set_to={set_to} cannot both be done")
        advance = None if advance is None else as_step(advance, "advance")
        set_to = None if set_to is None else as_step(set_to, "set_to")
        cluster = self._cluster
        write = cluster.write(0) if advance is not None or set_to is not None else ANY_WRITE
        cluster.step = cluster.fan_out(
            [0],
            lambda _, shard: shard.global_step(advance=advance, set_to=set_to, write=write),
            timeout_s=timeout_s,
            writes=advance is not None or set_to is not None,
        )[0]
        return cluster.step

    # ---- the cluster -------------------------------------------------------------------------------------------------

    def stats(self, *, timeout_s: float | None = None) -> list[ps_pb2.StatsResponse]:
        """Counters and sizes, per shard."""
        return self._cluster.everywhere(lambda _, shard: shard.stats(), timeout_s=timeout_s)

    def describe(self, *, timeout_s: float | None = None) -> list[ps_pb2.DescribeResponse]:
        """Identity and content, per shard."""
        return self._cluster.describe(timeout_s=timeout_s)

    def shutdown(self, *, timeout_s: float = 10.0) -> list[int]:
        """Have all PS end, as SIGTERM does, with status 0; returns the shards that did not answer within `timeout_s`.

        Only PS that were started as one run's own (`trilith ps --owned`) let themselves be ended: a cluster that others
        use, too, is not for one client to stop.

        Raises:
            InvalidRequestError: One of them was not; none is ended then.
        """

        def asked(index: int, shard: Shard) -> bool | None:
            try:
                return shard.describe().owned or not shard.remote  # one of this process says itself what it is
            except (UnavailableError, DeadlineExceededError):
                return None  # it is gone, or on its way: the second call finds out

        def told(index: int, shard: Shard) -> bool:
            try:
                shard.shutdown()
            except (UnavailableError, DeadlineExceededError):
                return False
            return True

        answers = self._cluster.everywhere(asked, timeout_s=timeout_s)
        if others := [index for index, owned in enumerate(answers) if owned is False]:
            raise InvalidRequestError(
                f"PS {', '.join(map(str, others))} let no client shut them down: they were started without `trilith ps "
                "--owned`, and others may use them"
            )
        return [index for index, ended in enumerate(self._cluster.everywhere(told, timeout_s=timeout_s)) if not ended]

    def save(self, path: str, *, timeout_s: float = 3600.0) -> int:
        """Write a checkpoint into the directory `path` (any fsspec URL that every PS can reach); returns its step.

        The manifest is written last, so the checkpoint is complete or absent. The PS may take `timeout_s` to write; one
        that cannot be reached is waited for no longer than by other calls.
        """
        from trilith.checkpoint import hold, part_of, write_manifest
        from trilith.folder import absolute

        where, began = absolute(path), time.time()
        with hold(where):
            replies = self.save_shards(where, timeout_s=timeout_s)
            parts = [part_of(index, len(replies), reply, began_unix_s=began) for index, reply in enumerate(replies)]
            return write_manifest(where, parts).global_step

    def save_shards(self, path: str, *, timeout_s: float = 3600.0) -> list[ps_pb2.SaveResponse]:
        """Have every shard write its files of a checkpoint, which is complete once somebody writes its manifest."""
        cluster = self._cluster
        return cluster.everywhere(lambda index, shard: shard.save(path, cluster.write(index)), timeout_s=timeout_s)

    def restore(
        self,
        path: str,
        *,
        variables: Mapping[str, Sequence[VariablePiece]] | None = None,
        step: int | None = None,
        timeout_s: float = 3600.0,
    ) -> int:
        """Replace the cluster's content by that of a complete checkpoint, of any number of PS; returns its step.

        To other clients it is as if every PS had restarted: their next call raises ShardRestartedError.

        Args:
            path: Of the checkpoint.
            variables: Dense variables by name as pieces of the checkpoint's, one after another; all others stay as they
                are. Optimizer state comes with them where the variable here has an optimizer of the same kind. None:
                the checkpoint's variables take the place of all.
            step: The model's from then on; None: the checkpoint's.
            timeout_s: How long the PS may take.

        Raises:
            CheckpointError: The checkpoint has no such variable, or not as many floats.
            InvalidRequestError: A table that the checkpoint does not know has rows, which would be lost.
        """
        from trilith.folder import absolute

        where = absolute(path)
        self._check_nothing_lost(where)
        sources = None if variables is None else _sources(variables)
        step = None if step is None else as_step(step, "step")
        self._cluster.restore(where, sources, step, timeout_s=timeout_s)
        return self._cluster.step

    def _check_nothing_lost(self, where: str) -> None:
        """What each PS checks for itself, for all before the first one changes; as far as it can be seen from here."""
        from trilith.checkpoint import check_nothing_lost, read_manifest

        try:
            known = read_manifest(where).rows()
        except (CheckpointError, InvalidRequestError, OSError):
            return
        rows: dict[str, int] = {}
        for shard in self.stats():
            for table in shard.tables:
                rows[table.table] = rows.get(table.table, 0) + table.rows
        check_nothing_lost(where, rows, known)

    def rejoin(self, *, recreate_tables: bool = False) -> list[Rejoined]:
        """Go on with shards that restarted, as they are now, after ShardRestartedError.

        Args:
            recreate_tables: Create tables, empty, that a shard came back without. Otherwise that is an error, because
                whatever they held is gone. Dense variables are created again with `create_variables`.

        Returns:
            The shards that came back: from which checkpoint, at which step.

        Raises:
            ShardRestartedError: A shard came back without tables that this client uses.
        """
        return self._cluster.rejoin(
            [info.config for info in self._tables.values()], self._variables.owners(), recreate_tables=recreate_tables
        )

    def close(self) -> None:
        """Release connections; further calls raise ClosedError."""
        self._cluster.close()
        if self._members is not None:
            self._members.close()

    def __reduce__(self) -> tuple[Callable[..., Client], tuple[Any, ...]]:
        """Pickled, a client is its address: unpickling connects anew, with an identity of its own.

        Raises:
            InvalidRequestError: The cluster is in this process, or the address holds a password.
        """
        if self.opened_by is None:
            raise InvalidRequestError(
                "the rows of an embedded cluster are in this process, so its client, tables and modules cannot be "
                "pickled; save the cluster with Client.save and a model with state_dict()"
            )
        address = self.opened_by[1][0]
        if redact(address) != address:
            raise InvalidRequestError(
                f"{redact(address)!r} has credentials, which no pickle shall hold; give them by ?auth_file= or ZK_AUTH"
            )
        return self.opened_by

    def __deepcopy__(self, memo: dict[int, Any]) -> Client:
        """The client itself: copies of a model look at the same rows."""
        return self

    def __enter__(self) -> Client:
        """Return the client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _factors(given: Mapping[str, float] | None) -> dict[str, float]:
    if not given:
        return {}
    from trilith.tables.schedules import as_factors

    return as_factors(given)


def _sources(variables: Mapping[str, Sequence[VariablePiece]]) -> ps_pb2.VariableSources:
    """Pieces by variable, as they travel."""
    return ps_pb2.VariableSources(
        variables=[
            ps_pb2.VariableSource(name=name, pieces=[ps_pb2.VariablePiece(**piece._asdict()) for piece in pieces])
            for name, pieces in variables.items()
        ]
    )


def _dim(config: ps_pb2.TableConfig) -> int:
    return sum(segment.dim_size for segment in config.hash_table.entry_config.segments)
