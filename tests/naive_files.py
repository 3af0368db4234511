"""Slow, plain twins of the filter, framing and entry kernels: each is the definition of right for its fast one."""

from __future__ import annotations

import struct

from google.protobuf.message import DecodeError

from trilith_proto import hash_table_pb2

# ==== occurrence filters ==============================================================================================


def mix64(value):
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def signature(fid, bits):
    return ((fid >> 17) | (fid << 15)) % 2**64 % 2 ** (bits - 4)


class Block:
    """Saturating counters: cells of [signature, count] or None."""

    def __init__(self, capacity, total, bits, steps):
        self.capacity, self.total, self.bits, self.steps = capacity, total, bits, steps
        self.cells = [None] * (total + 64)
        self.elements = self.failures = 0

    def usable(self, fid):
        home = mix64(fid) % self.total
        for index in range(home, home + self.steps):
            if self.cells[index] is None or self.cells[index][0] == signature(fid, self.bits):
                return index
        return None

    def count(self, fid):
        index = self.usable(fid)
        return self.cells[index][1] if index is not None and self.cells[index] else None

    def put(self, index, fid, count):
        if self.cells[index] is None:
            self.elements = min(self.capacity, self.elements + 1)
        self.cells[index] = [signature(fid, self.bits), min(15, count)]

    def add(self, fid, count):
        index = self.usable(fid)
        if index is None:
            self.failures += count > 0
            return 15
        old = self.cells[index][1] if self.cells[index] else 0
        if count:
            self.put(index, fid, old + count)
        return old

    def raw_cells(self):
        return [cell[0] * 16 + cell[1] if cell else 0 for cell in self.cells]


class Sliding:
    """A window of blocks."""

    def __init__(self, capacity, split_num):
        self.k = max(split_num, 5)
        block_capacity = max(capacity, 300) // (self.k - 1)
        self.make = lambda: Block(block_capacity, int(block_capacity * 1.2), 16, 16)
        self.blocks = [self.make() for _ in range(self.k)]
        self.head = self.moves = self.failures = 0

    def add(self, fid, count):
        for block in (self.blocks[self.head], self.blocks[(self.head + 1) % self.k]):
            index = block.usable(fid)
            if index is not None:
                break
        else:
            self.failures += count > 0
            return 15
        if block.cells[index]:
            old = block.cells[index][1]
        else:
            older = (self.blocks[(self.head - back) % self.k] for back in range(1, min(self.moves, self.k - 2) + 1))
            old = next((each.count(fid) for each in older if each.count(fid) is not None), 0)
        if count:
            fresh = block.cells[index] is None
            block.put(index, fid, old + count)
            if fresh and self.blocks[self.head].elements >= block.capacity - 1:
                self.head = (self.head + 1) % self.k
                self.moves += 1
                self.blocks[(self.head + 1) % self.k] = self.make()
        return old

    def filtered(self, fid, count, threshold):
        return threshold > 0 and self.add(fid, count) < threshold


# ==== TFRecord framing ================================================================================================


def crc32c(data):
    """Bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def frame_records(records):
    framed = b""
    for record in records:
        length = struct.pack("<Q", len(record))
        framed += length + struct.pack("<I", masked(length)) + record + struct.pack("<I", masked(record))
    return framed


def walk_records(data):
    """Records until one is cut off or damaged, and what is left."""
    found = []
    while len(data) >= 16:
        (length,) = struct.unpack("<Q", data[:8])
        if data[8:12] != struct.pack("<I", masked(data[:8])) or len(data) < length + 16:
            break
        payload = data[12 : 12 + length]
        if data[12 + length : 16 + length] != struct.pack("<I", masked(payload)):
            break
        found.append(payload)
        data = data[16 + length :]
    return found, data


# ==== EntryDump messages ==============================================================================================


def encode_entry(segments, fid, weights, state, time, with_id):
    """One message by the protobuf library. `segments`: (kind, [(slot, values)]) in order."""
    entry = hash_table_pb2.EntryDump(num=weights, last_update_ts_sec=time)
    if with_id:
        entry.id = fid - 2**64 if fid >= 2**63 else fid
    entry.opt.SetInParent()
    for (kind, slots), values in zip(segments, state, strict=True):
        if kind == "moving_average":
            continue
        chosen = getattr(entry.opt.dump.add(), kind)
        chosen.SetInParent()
        for slot, value in zip(slots, values, strict=True):
            if isinstance(value, list) and chosen.DESCRIPTOR.fields_by_name[slot].is_repeated:
                getattr(chosen, slot).extend(value)
            else:
                setattr(chosen, slot, value[0] if isinstance(value, list) else value)
    return entry.SerializeToString()


def decode_entry(layout, message, with_id):
    """(id, weights, state floats or int, time) of one message, None if it does not fit the layout."""
    try:
        entry = hash_table_pb2.EntryDump.FromString(message)
    except DecodeError:
        return None
    if (with_id and not entry.HasField("id")) or len(entry.num) != layout.dim:
        return None
    state = []
    dumped = [segment for segment in layout.segments if segment.kind != "moving_average"]
    if entry.opt.dump or layout.state_floats:
        if len(entry.opt.dump) != len(dumped):
            return None
        for segment, dump in zip(dumped, entry.opt.dump, strict=True):
            if dump.WhichOneof("type") != segment.kind:
                return None
            chosen = getattr(dump, segment.kind)
            for slot, floats in segment.slots:
                value = getattr(chosen, slot)
                if isinstance(value, float) and not chosen.HasField(slot):
                    return None
                if not isinstance(value, (int, float)) and len(value) != floats:
                    return None
                state.append(value if isinstance(value, (int, float)) else list(value))
    fid = entry.id % 2**64 if with_id else 0
    return fid, list(entry.num), state, entry.last_update_ts_sec % 2**32
