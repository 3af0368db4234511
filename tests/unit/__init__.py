"""One part at a time, in this process: kernels equal their slow twins, and everything else what it says of itself.

Flat: a file is found by the name of what it tests, and `tests/quick.py` groups files by part.
"""
