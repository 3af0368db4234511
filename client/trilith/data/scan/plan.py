"""What a scan is told: one block of int64, so that a kernel has one argument and serves every schema."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["BLOCK_ROWS", "NOWHERE", "REPEATED", "WANTED", "Slot"]


class Slot(IntEnum):
    """Places in the block. Arrays are given by address; they are C-contiguous."""

    ROWS = 0
    """Number of records."""
    BUFFER = 1
    """uint8[...]: the records' buffer."""
    OFFSETS = 2
    """int64[rows]."""
    LENGTHS = 3
    """int64[rows]."""
    NAMES = 4
    """int64[mask + 1, 3]: wanted names of features, for `wire.find_name`."""
    MASK = 5
    NAME_COUNT = 6
    """Names; those that an Example's reader promotes are the last of them."""
    RESERVED = 7
    """Number of the first promoted name: __LINE_ID__, then __LABEL__ and instance_weight."""
    MEMBERS = 8
    """int64[names, 17]: per field number of a value in Feature, column << 8 | element; `NOWHERE` if not wanted."""
    SLOTS = 9
    """uint16[1024]: column of the fids of each v1 slot, 0xFFFF for none; 0 instead of an address if none is wanted."""
    CONVERT = 10
    """Whether columns of v1 slots get v2 fids."""
    TOP = 11
    """int64[128]: what to do with each field of the message itself."""
    LINE = 12
    """int64[256]: what to do with each field of LineId."""
    COLUMNS = 13
    """Number of columns."""
    CURSORS = 14
    """int64[columns + 8], written: values so far."""
    CAPACITIES = 15
    """int64[columns]: room in each column."""
    REGIONS = 16
    """int64[columns]: address of each column's values, 64 bytes longer than its capacity."""
    CELLS = 17
    """uint64[cells, rows], written where a scalar is present."""
    PRESENT = 18
    """uint8[cells, rows], zeros, written: whether a scalar is present."""
    SEEN = 19
    """uint8[rows, names], zeros, written: which value each named feature has, 255 for none; 0 if it is absent."""
    SPLITS = 20
    """int64[columns, rows + 1], written."""
    BLOCK = 21
    """int64[BLOCK_ROWS, columns + 8]: scratch."""
    STATUS = 22
    """int64[rows], zeros, written: a code of `wire`, or `ODD`."""
    PLACES = 23
    """int64[rows], written: where in a record its trouble lies."""
    PROMOTE = 24
    """uint8[rows]: whether to promote reserved features of an Example."""
    LABEL = 25
    """Column of labels, -1 if not wanted."""
    WEIGHT = 26
    """Cell of the instance weight, -1 if not wanted."""
    LISTS = 27
    """int64[names, 3], written, for an ExampleBatch: features in the list, its type, its id; features -1 if absent."""
    EVERY_V1 = 28
    """Column of the v1 fids of all features of an Example, -1 if not wanted."""
    EVERY_V2 = 29
    """Column of the v2 fids of all features, -1 if not wanted."""
    TEXTS = 30
    """int64[names or 1, 2]: address and length of each name."""
    FOLLOWERS = 31
    """int64[names + 1], zeros, written: which wanted name came last behind each, behind none in the first place."""
    SIZE = 32


BLOCK_ROWS = 64
"""Rows whose splits are kept row by row before they are written column by column."""

NOWHERE = -1

# In the tables TOP and LINE an entry is element | REPEATED | WANTED | column or cell << 16; 0 is an unknown field.
REPEATED = 256
WANTED = 512
