"""Rows: what clients of embedding rows can be asked, wherever the rows are; Table: a handle on one table of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from trilith.batches import TableInfo, UpdateVerb, WriteOptions
from trilith.cluster import Rejoined
from trilith.errors import TrilithError
from trilith.queues import Queues
from trilith.shard import Float32Array, UInt64Array, VariablePiece
from trilith.tables.initial import Missing
from trilith_proto import ps_pb2

if TYPE_CHECKING:
    from trilith.tables.spec import TableSpec

__all__ = ["RowBatches", "Rows", "Table"]

_Updates = Mapping[str, tuple[Any, Any]]  # by table (ids [n], rows [n, dim]), array-likes


class RowBatches(Protocol):
    """The verbs that carry many ids, for those that route ids themselves; see `trilith.batches.Batches`."""

    def lookup(self, ids: Mapping[str, Any], timeout_s: float | None) -> dict[str, Float32Array]:
        """By table float32[n, dim]."""

    def lookup_owned(
        self, ids: Sequence[Mapping[str, UInt64Array]], timeout_s: float | None
    ) -> list[dict[str, Float32Array]]:
        """Per shard and table float32[n, dim], of ids that are arranged so."""

    def update(self, verb: UpdateVerb, updates: _Updates, options: WriteOptions) -> None:
        """One of the three writes of rows."""

    def update_owned(
        self, verb: UpdateVerb, updates: Sequence[Mapping[str, tuple[Any, ...]]], options: WriteOptions
    ) -> None:
        """The same, of ids that are arranged by shard; repeats are applied one after another."""


class Rows(Protocol):
    """What `trilith.Client` (rows on PS, or in this process) and `trilith.peers.PeerClient` (in the workers) both do.

    The methods are described at `Client`; what a client does not offer raises InvalidRequestError.
    """

    @property
    def together(self) -> bool:
        """Whether the rows are in the workers, who make the same calls in the same order, each with ids of its own."""

    @property
    def origin(self) -> object:
        """Equal for clients of the same rows."""

    @property
    def shards(self) -> int:
        """How many shards there are."""

    @property
    def addresses(self) -> list[str]:
        """host:port of every PS."""

    @property
    def features(self) -> Mapping[str, str]:
        """Name of its table by feature, as recorded through this client."""

    @property
    def known_step(self) -> int:
        """The model's step as this client last heard it."""

    def hear_step(self, step: int) -> None:
        """Know that the model is at `step` at least."""

    @property
    def queues(self) -> Queues:
        """String queues."""

    def table(self, name: str, **config: Any) -> Table:
        """A handle on a table, made if need be."""

    def create_tables(self, specs: Sequence[TableSpec]) -> dict[str, Table]:
        """Handles by name on tables, made if need be."""

    def table_info(self, name: str) -> TableInfo:
        """What is known of a table, or UnknownTableError."""

    def batches(self, *, float16: bool | None = None) -> RowBatches:
        """What moves batches, for those that route ids themselves."""

    def record_features(self, tables: Mapping[str, str]) -> None:
        """Put the table of each feature into the cluster's record, where there is one."""

    def lookup(
        self, ids: Mapping[str, Any], *, missing: Missing = "zeros", timeout_s: float | None = None
    ) -> dict[str, Float32Array]:
        """By table integers [n] to float32[n, dim]."""

    def begin_lookup(self, ids: Mapping[str, Any]) -> Callable[[], dict[str, Float32Array]]:
        """Have rows found that the returned call brings; before that call only where `together`."""

    def apply_gradients(
        self,
        updates: _Updates,
        *,
        global_step: int | None = None,
        advance: int = 0,
        rate_factors: Mapping[str, float] | None = None,
        request_time: int | None = None,
        allow_non_finite: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """One optimizer step per distinct id."""

    def assign(
        self,
        updates: _Updates,
        *,
        request_time: int | None = None,
        allow_non_finite: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Set weights."""

    def assign_add(
        self,
        updates: _Updates,
        *,
        request_time: int | None = None,
        allow_non_finite: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Add to weights."""

    def retry(self, error: TrilithError, *, timeout_s: float | None = None) -> None:
        """Send a write again that failed."""

    def drain(self) -> None:
        """Wait until updates that wait at their owners have been applied; there are such only where `together`."""

    def contains(self, table: str, ids: Any, *, timeout_s: float | None = None) -> npt.NDArray[np.bool_]:
        """bool[n]: whether each id has a row."""

    def reinitialize(
        self, table: str, ids: Any, *, request_time: int | None = None, timeout_s: float | None = None
    ) -> npt.NDArray[np.int8]:
        """Reset rows; int8[n]: 1 existed, 0 was created."""

    def lookup_entries(self, table: str, ids: Any, *, timeout_s: float | None = None) -> list[bytes]:
        """Whole entries."""

    def dump_entries(self, table: str, *, page: int = 1000, timeout_s: float | None = None) -> Iterator[bytes]:
        """Every entry of a table."""

    def erase(self, table: str, ids: Any, *, timeout_s: float | None = None) -> int:
        """Delete rows; returns how many there were."""

    def evict(
        self, tables: Sequence[str] | None = None, *, now: int | None = None, timeout_s: float | None = None
    ) -> dict[str, int]:
        """Delete expired rows; how many by table."""

    def clear(self, tables: Sequence[str] | None = None, *, timeout_s: float | None = None) -> dict[str, int]:
        """Drop every row of tables; how many by table."""

    def count_rows(self, table: str, *, timeout_s: float | None = None) -> int:
        """Rows of a table on all shards."""

    def create_variables(
        self, initial: Mapping[str, Any], *, optimizer: Any, timeout_s: float | None = None
    ) -> dict[str, bool]:
        """Create dense variables; by name, whether this call did."""

    def pull_variables(
        self, names: Sequence[str] | None = None, *, timeout_s: float | None = None
    ) -> tuple[dict[str, Float32Array], int]:
        """Values by name, and the step."""

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
        """One step of each variable's optimizer."""

    def assign_variables(
        self, values: Mapping[str, Any], *, allow_non_finite: bool = False, timeout_s: float | None = None
    ) -> None:
        """Set variables."""

    def variables(self, *, timeout_s: float | None = None) -> dict[str, tuple[int, ...]]:
        """Shapes of all dense variables."""

    def global_step(
        self, *, advance: int | None = None, set_to: int | None = None, timeout_s: float | None = None
    ) -> int:
        """The model's step, after advancing or setting it."""

    def stats(self, *, timeout_s: float | None = None) -> list[ps_pb2.StatsResponse]:
        """Counters and sizes of the shards that this client sees."""

    def describe(self, *, timeout_s: float | None = None) -> list[ps_pb2.DescribeResponse]:
        """Identity and content of the same."""

    def save(self, path: str, *, timeout_s: float = 3600.0) -> int:
        """Write a checkpoint; returns its step."""

    def restore(
        self,
        path: str,
        *,
        variables: Mapping[str, Sequence[VariablePiece]] | None = None,
        step: int | None = None,
        timeout_s: float = 3600.0,
    ) -> int:
        """Replace the content by that of a checkpoint; returns its step."""

    def rejoin(self, *, recreate_tables: bool = False) -> list[Rejoined]:
        """Go on with shards that restarted."""

    def close(self) -> None:
        """Release what the client holds."""

    def __enter__(self) -> Self:
        """Return the client itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""


class Table:
    """A handle on one table; holds nothing but its name."""

    def __init__(self, client: Rows, name: str) -> None:
        """Use `Client.table`."""
        self._client = client
        self.name = name

    def __repr__(self) -> str:
        """Name and dim."""
        return f"Table({self.name!r}, dim={self.dim})"

    @property
    def client(self) -> Rows:
        """The client this handle belongs to."""
        return self._client

    @property
    def dim(self) -> int:
        """Floats per row."""
        return self._client.table_info(self.name).dim

    @property
    def config(self) -> ps_pb2.TableConfig:
        """The table's config."""
        return self._client.table_info(self.name).config

    def lookup(self, ids: Any, **options: Any) -> Float32Array:
        """float32[n, dim]: row i for ids[i], zeros where an id has no row; options as in `Client.lookup`."""
        return self._client.lookup({self.name: ids}, **options)[self.name]

    def apply_gradients(self, ids: Any, grads: Any, **options: Any) -> None:
        """One optimizer step per distinct id; options as in `Client.apply_gradients`."""
        self._client.apply_gradients({self.name: (ids, grads)}, **options)

    def assign(self, ids: Any, values: Any, **options: Any) -> None:
        """Set weights; options as in `Client.assign`."""
        self._client.assign({self.name: (ids, values)}, **options)

    def assign_add(self, ids: Any, values: Any, **options: Any) -> None:
        """Add to weights; options as in `Client.assign_add`."""
        self._client.assign_add({self.name: (ids, values)}, **options)

    def reinitialize(self, ids: Any, **options: Any) -> npt.NDArray[np.int8]:
        """Reset rows; int8[n]: 1 existed, 0 was created. Options as in `Client.reinitialize`."""
        return self._client.reinitialize(self.name, ids, **options)

    def contains(self, ids: Any, **options: Any) -> npt.NDArray[np.bool_]:
        """bool[n]: whether each id has a row; options as in `Client.contains`."""
        return self._client.contains(self.name, ids, **options)

    def lookup_entries(self, ids: Any, **options: Any) -> list[bytes]:
        """Per id a serialized EntryDump without its id, b"" where there is no row; see `Client.lookup_entries`."""
        return self._client.lookup_entries(self.name, ids, **options)

    def erase(self, ids: Any, **options: Any) -> int:
        """Delete rows; returns how many there were. Options as in `Client.erase`."""
        return self._client.erase(self.name, ids, **options)

    def evict(self, **options: Any) -> int:
        """Delete expired rows; returns how many. Options as in `Client.evict`."""
        return self._client.evict([self.name], **options).get(self.name, 0)

    def clear(self, **options: Any) -> int:
        """Drop every row; returns how many there were. Options as in `Client.clear`."""
        return self._client.clear([self.name], **options).get(self.name, 0)

    def size(self, **options: Any) -> int:
        """Rows on all shards; options as in `Client.count_rows`."""
        return self._client.count_rows(self.name, **options)
