"""The engine: one shard's tables, variables and queues in memory, their locks, and the kernels that walk them."""
