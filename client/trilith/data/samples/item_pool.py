"""The pool of items that negatives are drawn from: per channel the latest distinct ones, saved as TFRecords."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from google.protobuf.message import DecodeError

from trilith.data.fids import make_fid_v2
from trilith.data.formats.readers import open_records
from trilith.data.formats.tfrecord import concatenate, frame_records
from trilith.errors import DataError, InvalidRequestError
from trilith.folder import Folder
from trilith_proto import example_pb2

__all__ = ["ChannelPool", "ItemPool", "PoolSnapshot", "PooledItem", "pool_path", "worker_identity"]

_SIGN, _WORD = 1 << 63, 1 << 64
_FILE = re.compile(r"(?:model\.ckpt-(?P<step>\d+)_)?item_pool_(?P<worker>\d+)_(?P<shard>\d+)_(?P<workers>\d+)")


@dataclass(slots=True)
class PooledItem:
    """One item.

    Attributes:
        gid: Item id, unsigned.
        fids: Item-side flat fids, unsigned.
        features: Item-side features, each a serialized NamedFeature.
        origin_cnt: How often the item came.
        sample_cnt: How often it was drawn.
    """

    gid: int
    fids: tuple[int, ...] = ()
    features: tuple[bytes, ...] = ()
    origin_cnt: int = 1
    sample_cnt: int = 0


class ChannelPool:
    """The latest distinct items of one channel, at most `capacity`: the oldest goes first.

    An item that comes again keeps its place and its features, and is counted.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: dict[int, PooledItem] = {}
        self._ring: list[int] = []  # gids; the oldest is at `_head`
        self._head = 0

    def __len__(self) -> int:
        return len(self._ring)

    def add(self, item: PooledItem) -> None:
        """Take an item in, or count one that is there."""
        known = self._items.get(item.gid)
        if known is not None:
            known.origin_cnt += 1
            return
        self._items[item.gid] = item
        if len(self._ring) < self._capacity:
            self._ring.append(item.gid)
            return
        del self._items[self._ring[self._head]]
        self._ring[self._head] = item.gid
        self._head = (self._head + 1) % self._capacity

    def __getitem__(self, place: int) -> PooledItem:
        return self._items[self._ring[(self._head + place) % len(self._ring)]]

    def __iter__(self) -> Iterator[PooledItem]:
        """The items, oldest first."""
        return (self[place] for place in range(len(self)))


class ItemPool:
    """Items by channel. Not for use by several threads at once.

    Args:
        start_num: Items a channel must exceed before anything is drawn from it.
        max_item_num_per_channel: Most items of a channel.
    """

    def __init__(self, start_num: int, max_item_num_per_channel: int) -> None:
        if start_num < 0:
            raise InvalidRequestError(f"start_num={start_num} is below 0")
        if max_item_num_per_channel < 1:
            raise InvalidRequestError(f"max_item_num_per_channel={max_item_num_per_channel} is below 1")
        self.start_num = start_num
        self.capacity = max_item_num_per_channel
        self._channels: dict[int, ChannelPool] = {}

    @property
    def channels(self) -> Mapping[int, ChannelPool]:
        """The pools by channel, unsigned."""
        return self._channels

    def add(self, channel: int, item: PooledItem) -> None:
        """Take an item in."""
        pool = self._channels.get(channel)
        if pool is None:
            pool = self._channels[channel] = ChannelPool(self.capacity)
        pool.add(item)

    def sample(self, channel: int, bits: int) -> tuple[PooledItem, float, float] | None:
        """Draw an item.

        Args:
            channel: From which.
            bits: 64 random bits, which decide.

        Returns:
            The item, and how young it is and how rarely it was drawn, both in (0, 1]; None if the channel does not hold
            enough.
        """
        pool = self._channels.get(channel)
        if pool is None or len(pool) <= self.start_num:
            return None
        place = bits % len(pool)
        item = pool[place]
        item.sample_cnt += 1
        return item, (place + 1) / len(pool), 1 / item.sample_cnt

    def channel_by_size(self, bits: int) -> int:
        """A channel drawn with a chance that is its share of all items."""
        place = bits % sum(len(pool) for pool in self._channels.values())
        for channel, pool in self._channels.items():
            if place < len(pool):
                return channel
            place -= len(pool)
        raise AssertionError("the sizes add up")

    def random_fill(self, bits: Iterator[int]) -> None:
        """Fill channels 0 to 9 with items 0 to 49 that have a random feature each, for trying things out."""
        for channel in range(10):
            for gid in range(50):
                drawn = next(bits)
                slot = drawn % 1000
                feature = example_pb2.NamedFeature(name=f"fc_{slot}")
                feature.feature.fid_v2_list.value.append(make_fid_v2(slot, drawn >> 16))
                self.add(channel, PooledItem(gid, (), (feature.SerializeToString(),)))

    # ---- what it holds, for positions and files ----------------------------------------------------------------------

    def export(self) -> list[bytes]:
        """Every channel as a serialized ChannelCache."""
        return [
            _channel_cache(channel, pool).SerializeToString(deterministic=True)
            for channel, pool in self._channels.items()
        ]

    def snapshot(self) -> PoolSnapshot:
        """A copy of what it holds, as cheap as a copy can be."""
        return PoolSnapshot({channel: [replace(item) for item in pool] for channel, pool in self._channels.items()})

    def replace(self, caches: Iterable[bytes]) -> None:
        """Hold what `export` gave instead."""
        self._channels.clear()
        self.push(caches, "(position)")

    def push(self, caches: Iterable[bytes], source: str) -> None:
        """Take in channels, item by item in their order, with their counters."""
        for number, payload in enumerate(caches):
            try:
                cache = example_pb2.ChannelCache.FromString(payload)
            except DecodeError as error:
                raise DataError(f"{source}: record {number}: not a ChannelCache: {error}") from None
            for data in cache.feature_datas:
                features = tuple(each.SerializeToString() for each in data.feature_columns)
                fids = tuple(fid % _WORD for fid in data.fids)
                item = PooledItem(data.gid % _WORD, fids, features, data.origin_cnt, data.sample_cnt)
                self.add(cache.channel_id % _WORD, item)

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, model_path: str, global_step: int, *, nshards: int = 1, worker: int = 0, workers: int = 1) -> None:
        """Write the pool's files; a channel is in the file of its number modulo `nshards`.

        Args:
            model_path: The model's directory, any fsspec URL.
            global_step: The model's step.
            nshards: Number of files.
            worker: This worker's index (see `worker_identity`).
            workers: Number of workers.
        """
        if nshards < 1:
            raise InvalidRequestError(f"nshards={nshards} is below 1")
        folder = Folder(model_path)
        for shard in range(nshards):
            mine = [
                _channel_cache(channel, pool).SerializeToString(deterministic=True)
                for channel, pool in self._channels.items()
                if channel % nshards == shard
            ]
            name = os.path.basename(pool_path(model_path, global_step, worker, shard, workers))
            folder.write(name, frame_records(*concatenate(mine)).tobytes())

    def restore(self, model_path: str, global_step: int, *, nshards: int = 1, worker: int = 0) -> bool:
        """Take in what was saved at a step, or at the newest one before it.

        Args:
            model_path: The model's directory.
            global_step: The model's step.
            nshards: Number of files.
            worker: This worker's index; if the save had fewer workers, that modulo their number counts.

        Returns:
            Whether there was anything.
        """
        folder = Folder(model_path)
        saved = [(name, found) for name in folder.names() if (found := _FILE.fullmatch(name))]
        steps = {int(found["step"]) for _, found in saved if found["step"] is not None}
        usable = [step for step in steps if step <= global_step]
        chosen = None if not usable else (global_step if global_step in steps else max(usable))
        counts = {
            int(found["workers"])
            for _, found in saved
            if (found["step"] is None if chosen is None else found["step"] == str(chosen))
        }
        if not counts:
            return False
        workers = max(counts)
        restored = False
        for shard in range(nshards):
            name = self._newest(saved, global_step, worker % workers, shard, workers)
            if name is not None:
                path = folder.path(name)
                with open_records(path, kind="plaintext", format="tfrecord") as reader:
                    for records in reader:
                        self.push(records.payloads(), path)
                restored = True
        return restored

    @staticmethod
    def _newest(saved: Iterable[tuple[str, Any]], limit: int, worker: int, shard: int, workers: int) -> str | None:
        """The file of a worker's shard with the largest step up to `limit`; one without a step if there is none."""
        mine = [
            (-1 if found["step"] is None else int(found["step"]), name)
            for name, found in saved
            if (int(found["worker"]), int(found["shard"]), int(found["workers"])) == (worker, shard, workers)
        ]
        return max(((step, name) for step, name in mine if step <= limit), default=(0, None))[1]


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """What a pool held at some moment."""

    channels: dict[int, list[PooledItem]] = field(default_factory=dict)

    def export(self) -> list[bytes]:
        """Every channel as a serialized ChannelCache."""
        return [
            _channel_cache(channel, items).SerializeToString(deterministic=True)
            for channel, items in self.channels.items()
        ]


def pool_path(model_path: str, global_step: int, worker: int, shard: int, workers: int) -> str:
    """Where a worker's file is."""
    return f"{model_path.rstrip('/')}/model.ckpt-{global_step}_item_pool_{worker}_{shard}_{workers}"


def worker_identity(tf_config: str | None = None) -> tuple[int, int]:
    """This worker's index and the number of workers.

    Args:
        tf_config: JSON as in the variable TF_CONFIG: the chief is 0 and worker i is i + 1. None: one worker.
    """
    if not tf_config:
        return 0, 1
    try:
        config = json.loads(tf_config)
        cluster, task = config.get("cluster", {}), config["task"]
        index = 0 if task["type"] == "chief" else int(task["index"]) + 1
        return index, max(1, len(cluster.get("chief", ())) + len(cluster.get("worker", ())))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequestError(f"TF_CONFIG {tf_config!r}: {error!r}") from None


def _channel_cache(channel: int, items: Iterable[PooledItem]) -> example_pb2.ChannelCache:
    cache = example_pb2.ChannelCache(channel_id=_signed(channel))
    for item in items:
        data = cache.feature_datas.add(
            gid=_signed(item.gid),
            fids=[_signed(fid) for fid in item.fids],
            origin_cnt=item.origin_cnt,
            sample_cnt=item.sample_cnt,
        )
        for feature in item.features:
            data.feature_columns.add().ParseFromString(feature)
    return cache


def _signed(value: int) -> int:
    return value - _WORD if value >= _SIGN else value
