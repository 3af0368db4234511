"""Slow, plain twins of the kernels of record framing: the definition of right for `find_frames` and `write_frames`."""

from __future__ import annotations

import struct

POISON = 0xFEFEFEFE


def find_frames(data, flags, limit=(1 << 31) - 1):
    """[(start, payload, key, type)] of the whole records; why it stopped: "whole", "poison", "payload" or "sort id".

    Flags: 1 lagrangex header, 2 kafka dump prefix, 4 sort id, 8 kafka dump.
    """
    found = []
    at = 0

    def take(count):
        nonlocal at
        if at + count > len(data):
            raise EOFError
        at += count
        return data[at - count : at]

    def number():
        return struct.unpack("<Q", take(8))[0]

    while True:
        start = at
        key = kind = aggregate = 0
        try:
            if flags & 1:
                head = number()
                kind, key = head & 0xFF, head & 0xFFFFFF00
            else:
                if flags & 2:
                    aggregate = number()
                    if aggregate == 0:
                        number()
                if flags & 4:
                    size = aggregate or number()
                    if size > limit:
                        return found, "sort id"
                    take(size)
                if flags & 8:
                    number()
            length = number()
            if length == POISON:
                return found, "poison"
            if length > limit:
                return found, "payload"
            found.append((start, take(length), key, kind))
        except EOFError:
            return found, "whole"


def write_frames(payloads, flags, keys=None, sort_id=b"", kind=0):
    """Records with their frames; header fields nobody asked for are zero."""
    out = b""
    for index, payload in enumerate(payloads):
        if flags & 1:
            out += struct.pack("<Q", (keys[index] if keys else 0) & 0xFFFFFF00 | kind)
        else:
            out += bytes(16) if flags & 2 else b""
            out += struct.pack("<Q", len(sort_id)) + sort_id if flags & 4 else b""
            out += bytes(8) if flags & 8 else b""
        out += struct.pack("<Q", len(payload)) + payload
    return out
