"""TableCopy: one table handed out whole, some ids at a time, while it goes on changing."""

from __future__ import annotations

import numpy as np

from trilith.shard import UInt64Array
from trilith_services.ps.engine.table import Table

__all__ = ["TableCopy"]


class TableCopy:
    """The ids of a table, stripe after stripe, each stripe as it is when its turn comes.

    What changes behind the copy is in the change log; if there is too much of it, the table is copied `again` when this
    copy has ended, not anew in the middle of it, so that copies end however much is written. `peek` gives the same ids
    until `arrived` says that the replica has them; nothing is listed before the replica knows that the copy begins.

    Attributes:
        since: Unix seconds before the first id was listed: what was acknowledged by then is in the copy.
        before: Up to when the copy before this one brought the table; 0: there was none.
    """

    def __init__(self, name: str, table: Table, *, before: float = 0.0) -> None:
        self.name = name
        self.table = table
        self.since = 0.0
        self.before = before
        self.begun = False
        self.again = False
        self._stripe = 0
        self._ids: UInt64Array = np.empty(0, np.uint64)

    @property
    def rows_to_come(self) -> int:
        """About how many rows are still to be sent."""
        return len(self._ids) + len(self.table) * (self.table.stripes - self._stripe) // self.table.stripes

    def peek(self, most: int) -> tuple[UInt64Array, bool]:
        """Up to `most` ids, and whether they are the last."""
        pieces, have = [self._ids], len(self._ids)
        while have < most and self._stripe < self.table.stripes:
            pieces.append(self.table.stripe_ids(self._stripe))
            have += len(pieces[-1])
            self._stripe += 1
        self._ids = np.concatenate(pieces)
        return self._ids[:most], self._stripe == self.table.stripes and have <= most

    def arrived(self, count: int) -> None:
        """The replica has `count` more ids, or knows that the copy begins."""
        self.begun = True
        self._ids = self._ids[count:]
