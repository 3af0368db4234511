"""A model's tables in this process: unique names, one step counter, one choice between training and export.

These are the reference system's table objects: a single table with its rates and filter, and what is built from it. A
cluster does not need them; tools and tests that work on tables without a cluster do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trilith.errors import InvalidRequestError
from trilith.tables import CuckooHashTable, Fp32, HashTableConfig, Segment, Sgd, Zeros
from trilith.tables.spec import seed_of
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.ps.engine.filters import DummyFilter, OccurrenceFilter, create_hash_filters
from trilith_services.ps.engine.table import OccurrenceGate, Table

if TYPE_CHECKING:
    from trilith_services.ps.reference.multi_table import MultiTable
    from trilith_services.ps.reference.multi_type_table import MultiTypeTable
    from trilith_services.ps.reference.single_table import SingleTable

__all__ = ["Model"]


class Model:
    """The scope in which table names are unique and the step counter is one.

    Attributes:
        global_step: What schedules read.
        exporting: Tables made while this is set hold serving rows.
    """

    def __init__(self, *, exporting: bool = False) -> None:
        self.global_step = 0
        self.exporting = exporting
        self._names: set[str] = set()

    def take_name(self, name: str) -> str:
        """Reserve a name; InvalidRequestError if it is taken."""
        if name in self._names:
            raise InvalidRequestError(f"table name {name!r} is taken in this model")
        self._names.add(name)
        return name

    def make_table(self, name: str, config: HashTableConfig, gate: OccurrenceGate | None) -> Table:
        """Build the rows behind one config."""
        proto = ps_pb2.TableConfig(name=name, seed=seed_of(name), hash_table=config.table_config)
        segments = proto.hash_table.entry_config.segments
        if proto.hash_table.WhichOneof("type") is None:
            raise InvalidRequestError(f"table {name!r}: the config chooses no type; cuckoo is the one there is")
        if len(config.learning_rate_fns) != len(segments):
            raise InvalidRequestError(
                f"table {name!r}: {len(config.learning_rate_fns)} learning rates for {len(segments)} segments"
            )
        if self.exporting:
            proto.hash_table.entry_config.entry_type = hash_table_pb2.EntryConfig.SERVING
        return Table(proto, gate=None if isinstance(gate, DummyFilter) else gate)

    def hash_table(
        self,
        config: HashTableConfig,
        *,
        hash_filter: OccurrenceFilter | None = None,
        name_suffix: str = "",
        saver_parallel: int = -1,
    ) -> SingleTable:
        """Make one table; its name is "MonolithHashTable_" and the suffix."""
        from trilith_services.ps.reference.single_table import SingleTable

        return SingleTable(
            self, config, hash_filter=hash_filter, name_suffix=name_suffix, saver_parallel=saver_parallel
        )

    def multi_table(
        self,
        configs: Mapping[str, HashTableConfig],
        *,
        hash_filter: OccurrenceFilter | None = None,
        name_suffix: str = "",
        saver_parallel: int = -1,
    ) -> MultiTable:
        """Make several tables with one filter and one set of files."""
        from trilith_services.ps.reference.multi_table import MultiTable

        return MultiTable(
            self, configs, hash_filter=hash_filter, name_suffix=name_suffix, saver_parallel=saver_parallel
        )

    def multi_type_table(
        self, configs: Mapping[str, HashTableConfig], *, hash_filter: OccurrenceFilter | None = None
    ) -> MultiTypeTable:
        """Make several single tables behind the interface of one."""
        from trilith_services.ps.reference.multi_type_table import MultiTypeTable

        return MultiTypeTable(
            configs, lambda name, config: self.hash_table(config, hash_filter=hash_filter, name_suffix=name)
        )

    def test_hash_table(
        self,
        dim: int,
        *,
        enable_hash_filter: bool = False,
        name_suffix: str | None = None,
        learning_rate: float = 1.0,
        occurrence_threshold: int = 0,
        expire_time: int = 36500,
        extra_restore_names: list[str] | None = None,
    ) -> SingleTable:
        """Make a table of one segment with zeros, SGD and float32, for tests and experiments."""
        table_config = hash_table_pb2.EmbeddingHashTableConfig()
        CuckooHashTable().mutate_table(table_config)
        table_config.slot_expire_time_config.default_expire_time = expire_time
        table_config.entry_config.segments.append(Segment(dim, Zeros(), Sgd(), Fp32()).as_proto())
        thresholds = hash_table_pb2.SlotOccurrenceThresholdConfig(default_occurrence_threshold=occurrence_threshold)
        (hash_filter,) = create_hash_filters(0, enable_hash_filter, thresholds)
        suffix = name_suffix if name_suffix is not None else f"test_{len(self._names)}"
        return self.hash_table(
            HashTableConfig(table_config, [learning_rate], extra_restore_names),
            hash_filter=hash_filter,
            name_suffix=suffix,
        )
