"""Writer: the few changes a person may make through a console that was started to allow them."""

from __future__ import annotations

import numpy as np

from trilith.errors import InvalidRequestError, TrilithError, UnknownTableError
from trilith.shard import Float32Array, IdPart, UpdatePart, Write
from trilith_services.console.members import Members

__all__ = ["Writer"]


class Writer:
    """Writes to one cluster. Each write, done twice, gives what it gives done once, so retries need no sequence."""

    def __init__(self, members: Members) -> None:
        self._members = members

    def assign(self, table: str, value: int, weights: Float32Array) -> None:
        """Set a row.

        Raises:
            InvalidRequestError: There are not as many weights as the table's rows have.
            UnknownTableError: There is no such table.
        """
        shard = self._members.shard(self._members.owner(value))
        configs = {config.name: config for config in shard.describe().tables}
        if table not in configs:
            raise UnknownTableError(f"no table {table!r}; this cluster has {sorted(configs)}")
        dim = sum(segment.dim_size for segment in configs[table].hash_table.entry_config.segments)
        if weights.size != dim:
            raise InvalidRequestError(f"{weights.size} weights for table {table!r}, whose rows have {dim}")
        update = UpdatePart(table, np.array([value], np.uint64), weights[None])
        shard.assign([update], Write())

    def erase(self, table: str, value: int) -> int:
        """Delete a row; returns how many there were."""
        part = IdPart(table, np.array([value], np.uint64))
        return self._members.shard(self._members.owner(value)).erase(part, Write())

    def evict(self, table: str) -> int:
        """Delete what has expired by each shard's clock; returns how many rows.

        Raises:
            TrilithError: A shard failed; others may have deleted theirs.
        """
        members = self._members
        answers = members.each(
            range(members.count), lambda index: members.shard(index).evict([table], Write()).get(table, 0)
        )
        for answer in answers.values():
            if isinstance(answer, TrilithError):
                raise answer
        return sum(answer for answer in answers.values() if isinstance(answer, int))
