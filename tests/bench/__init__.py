"""Benchmarks against references measured in the same run: `python -m tests.bench`.

Flat: a file is what is measured, or what it is measured with.
"""
