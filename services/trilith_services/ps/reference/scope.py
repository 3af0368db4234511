"""Scope: what the tables of one model share: unique names, one step counter, one choice between training and export.

Its tables are the reference system's table objects: a single table with its rates and filter, and what is built from
it. A cluster does not need them; tools and tests that work on tables without a cluster do.
"""

from __future__ import annotations

from trilith.errors import InvalidRequestError
from trilith.tables import HashTableConfig
from trilith.tables.spec import seed_of
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.ps.engine.filters import OccurrenceFilter
from trilith_services.ps.engine.table import Table
from trilith_services.ps.reference.hash_filters import DummyFilter

__all__ = ["Scope"]


class Scope:
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

    def make_table(self, name: str, config: HashTableConfig, hash_filter: OccurrenceFilter | None) -> Table:
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
        return Table(proto, filter=None if isinstance(hash_filter, DummyFilter) else hash_filter)
