"""Bytes that were released once and must keep their meaning: wire messages, ownership, new rows, files, checkpoints.

`v1/` holds them; nothing rewrites it. A format that changes gets a `v2/` beside it (`python -m tests.golden.write
DIRECTORY`), and `v1/` goes on being read.
"""
