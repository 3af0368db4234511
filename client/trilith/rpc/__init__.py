"""One shard, or one entry, behind gRPC channels: calls, streams, bytes, connections."""
