"""Not here yet."""

OPS = {}
