"""What is compiled before a PS serves, whatever its tables are."""

from __future__ import annotations

from trilith.ops.jit import warm
from trilith_services.ps.engine.kernels import gather, index, sweep
from trilith_services.ps.engine.kernels.read import export_rows, lookup_rows, lookup_rows_half
from trilith_services.ps.engine.kernels.values import all_finite, widen_halves
from trilith_services.ps.engine.kernels.write import write_rows

__all__ = ["compile_common_kernels"]


def compile_common_kernels() -> None:
    """Compile or load the kernels that all tables share, whatever their optimizers."""
    warm(
        index.group_by_stripe,
        index.find_rows,
        index.erase_rows,
        sweep.copy_places,
        sweep.match_index,
        sweep.sort_freed,
        sweep.drop_freed,
        sweep.move_rows,
        sweep.any_expired,
        sweep.evict_rows,
        sweep.scan_index,
        sweep.mark_expired,
        gather.gather_rows,
        lookup_rows,
        lookup_rows_half,
        write_rows,
        export_rows,
        widen_halves,
        all_finite,
    )
