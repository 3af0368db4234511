"""Compiled loops of the engine.

House rules: kernels take arrays, addresses and scalars, write only what their docstring says, allocate nothing but a
few words of scratch, and check nothing: `Table` has checked. The plain-Python functions behind them run with
NUMBA_DISABLE_JIT=1.
"""
