"""Checkpoint directories: what their files are called and say, which are complete, and which may go.

What stands inside the row files is the PS's business (`trilith_services.ps.checkpoint.snapshot`). A checkpoint is one
directory:

    table-user.00000-of-00002.3f9c0a1b.arrow     rows of table "user" on PS 0 of 2 (and so on per table and PS)
    variables.00000-of-00002.3f9c0a1b.arrow      dense partitions of PS 0
    queues.00000-of-00002.3f9c0a1b.json          string queues, where there are any (on PS 0)
    part.00000-of-00002.81c2d4e6.json            what PS 0 wrote: names, sizes, CRC-32C; written after its files
    manifest.json                                all parts; written last, so a checkpoint is complete or absent

The eight hex digits of data files are fresh for every save, so saving again into a directory never touches a file that
a manifest names; those of a part are the life of the process that wrote it (earlier versions left them out). Empty
files say what goes on:

    round.00000001700000000000                   all PS take part by themselves; the number is its place in the order
    order.00000001700000000000                   the same of one that a client asks for, where the clock ran backwards
    saving.00000-of-00002.81c2d4e6               this process is writing its files
    held.01700003600.5b7e01c3                    somebody reads or writes here until then (Unix s): not to be pruned

Beside the checkpoints, `ps.00000-of-00002.json` says which process is PS 0 of 2: only its parts count. The empty file
`leaving.00000-of-00002.00000001700000000000` says that it ends, or has ended, with that checkpoint.

Checkpoints are named by the clock and ordered by when they were begun: a clock that was set back makes the names of
later ones smaller, not them older. Paths are local or any URL that fsspec knows.
"""

from trilith.checkpoint.listing import (
    CheckpointInfo,
    list_checkpoints,
    mark_order,
    newest_complete,
    next_number,
    next_order,
    prune,
)
from trilith.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    Part,
    check_nothing_lost,
    collect_parts,
    part_of,
    parts_there,
    read_manifest,
    write_manifest,
    write_part,
)
from trilith.checkpoint.marks import hold, leaving, mark_leaving, read_holder, write_holder
from trilith.checkpoint.names import checkpoint_name, file_name, part_name, round_name, saving_name

__all__ = [
    "MANIFEST",
    "CheckpointInfo",
    "FileRecord",
    "Manifest",
    "Part",
    "check_nothing_lost",
    "checkpoint_name",
    "collect_parts",
    "file_name",
    "hold",
    "leaving",
    "list_checkpoints",
    "mark_leaving",
    "mark_order",
    "newest_complete",
    "next_number",
    "next_order",
    "part_name",
    "part_of",
    "parts_there",
    "prune",
    "read_holder",
    "read_manifest",
    "round_name",
    "saving_name",
    "write_holder",
    "write_manifest",
    "write_part",
]
