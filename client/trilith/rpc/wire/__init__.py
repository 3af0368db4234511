"""The messages that carry arrays, written and read without the protobuf library's copies.

A message with a `payload` (field 15, last) is its header, encoded by the library (those of lookups by hand), then one
tag, one length and the bytes. Arrays are therefore written straight into the object that gRPC sends, and read as views
of the one it received. The bytes are those the library itself would write; a message laid out in any other legal way is
read by the library.
"""

from trilith.rpc.wire.dense import (
    pack_create_variables,
    pack_dense_update,
    pack_pulled,
    unpack_create_variables,
    unpack_dense_update,
    unpack_pulled,
)
from trilith.rpc.wire.ids import pack_ids, pack_statuses, unpack_ids, unpack_statuses
from trilith.rpc.wire.lookup import (
    new_lookup_response,
    pack_lookup_request,
    unpack_lookup_request,
    unpack_lookup_response,
)
from trilith.rpc.wire.payload import pack, parse, unpack
from trilith.rpc.wire.update import (
    new_update_request,
    pack_update_request,
    unpack_update_request,
    unpack_write,
    write_id,
)

__all__ = [
    "new_lookup_response",
    "new_update_request",
    "pack",
    "pack_create_variables",
    "pack_dense_update",
    "pack_ids",
    "pack_lookup_request",
    "pack_pulled",
    "pack_statuses",
    "pack_update_request",
    "parse",
    "unpack",
    "unpack_create_variables",
    "unpack_dense_update",
    "unpack_ids",
    "unpack_lookup_request",
    "unpack_lookup_response",
    "unpack_pulled",
    "unpack_statuses",
    "unpack_update_request",
    "unpack_write",
    "write_id",
]
