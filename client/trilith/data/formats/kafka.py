"""Kafka topics as records: each message holds one or more framed records, or is one."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trilith.data.choices import OnError, check_on_error
from trilith.data.formats.framing import Framing, Scratch, explain, split_frames
from trilith.data.formats.reading import Losses, Position, RecordReader
from trilith.data.records import Kind, Records
from trilith.errors import DataError, InvalidRequestError, UnavailableError
from trilith.runtime.extras import need

__all__ = ["KafkaReader", "client_settings"]

_LOG = logging.getLogger(__name__)
_TOPIC = "conf.topic."
_BATCH = "batch.num.messages"
_DEFAULT_BATCH = 128
_DEFAULT_BATCH_OF_BATCHES = 16


def client_settings(
    *,
    group_id: str | None = None,
    servers: str | None = None,
    poll_batch_size: int | None = None,
    configuration: Sequence[str] = (),
    kafka_other_metadata: str = "",
) -> dict[str, str]:
    """Settings of the client library, later ones winning.

    Args:
        group_id: The consumer group.
        servers: host:port, separated by commas.
        poll_batch_size: Most messages of a poll.
        configuration: "key=value" strings; keys that begin with `conf.topic.` are settings of topics.
        kafka_other_metadata: More of them, separated by commas.

    Returns:
        Settings by key. Without others: servers localhost:9092, group test-consumer-group, 1024 messages a poll. The
        end of a partition is always reported.
    """
    given = list(configuration)
    given += [f"group.id={group_id}"] if group_id else []
    given += [f"bootstrap.servers={servers}"] if servers else []
    given += [f"{_BATCH}={poll_batch_size}"] if poll_batch_size else []
    given += [item for item in kafka_other_metadata.split(",") if item.strip()]
    settings = {"bootstrap.servers": "localhost:9092", "group.id": "test-consumer-group", _BATCH: "1024"}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise InvalidRequestError(f"Kafka setting {item!r}: write key=value")
        settings[key.strip().removeprefix(_TOPIC)] = value.strip()
    settings["enable.partition.eof"] = "true"
    return settings


class KafkaReader(RecordReader):
    """Records of topics, a chunk per poll that found any.

    A record's source is its topic and partition, its number the offset of its message, its position the byte within
    that message; a tombstone, a message without a value, holds none. The reader ends when nothing came for
    `stream_timeout`; messages that came before are always given out. That no broker answers is an error.

    Args:
        topics: One or several.
        group_id: The consumer group; partitions are shared among its members.
        servers: host:port, separated by commas.
        kind: What the payloads are.
        framing: What stands in front of payloads; nothing but the length, if left out.
        unframe: False takes each message as one record, without a frame.
        poll_batch_size: Most messages of a chunk; 128, or 16 of ExampleBatches, if left out.
        message_poll_timeout: Milliseconds a poll waits for a message.
        stream_timeout: Milliseconds without a message after which the reader ends, at least `message_poll_timeout`; -1
            waits forever.
        filter_empty: Whether records without a payload are dropped.
        configuration: More settings, "key=value".
        kafka_other_metadata: More of them, separated by commas; these win.
        start: Where to go on: partitions are then assigned as they are named, not shared in the group.
        on_error: "raise" for a message that does not hold whole records, or "skip" the rest of it and count that.
    """

    def __init__(
        self,
        topics: str | Sequence[str],
        *,
        group_id: str | None = None,
        servers: str | None = None,
        kind: Kind | str = Kind.INSTANCE,
        framing: Framing | None = None,
        unframe: bool = True,
        poll_batch_size: int | None = None,
        message_poll_timeout: int = 10_000,
        stream_timeout: int = -1,
        filter_empty: bool = False,
        configuration: Sequence[str] = (),
        kafka_other_metadata: str = "",
        start: Position | None = None,
        on_error: OnError = "raise",
    ) -> None:
        need("confluent_kafka", extra="data")
        from confluent_kafka import Consumer, KafkaException, TopicPartition

        if stream_timeout < -1:
            raise InvalidRequestError(f"stream_timeout={stream_timeout}: -1 for ever, or milliseconds from 0 up")
        if message_poll_timeout < 1:
            raise InvalidRequestError(f"message_poll_timeout={message_poll_timeout}: at least one millisecond")
        check_on_error(on_error)
        self.kind: Kind = Kind(kind)
        self.losses = Losses()
        self._framing = (framing or Framing()) if unframe else None
        self._filter_empty = filter_empty
        self._skip_damage = on_error == "skip"
        self._poll_s = message_poll_timeout / 1000
        self._stream_s = None if stream_timeout == -1 else max(stream_timeout, message_poll_timeout) / 1000
        self._scratch = Scratch(1024)
        self._next: dict[tuple[str, int], int] = {}
        self._ended: set[tuple[str, int]] = set()
        self._records = 0
        self._damage: str | None = None
        default = _DEFAULT_BATCH_OF_BATCHES if self.kind is Kind.EXAMPLE_BATCH else _DEFAULT_BATCH
        settings = client_settings(
            group_id=group_id,
            servers=servers,
            poll_batch_size=poll_batch_size or default,
            configuration=configuration,
            kafka_other_metadata=kafka_other_metadata,
        )
        self._batch = _positive(settings.pop(_BATCH))
        self._servers, self._group = settings["bootstrap.servers"], settings["group.id"]
        names = [topics] if isinstance(topics, str) else list(topics)
        try:
            self._consumer: Any = Consumer({"logger": _LOG, **settings})
        except (KafkaException, ValueError) as error:
            raise InvalidRequestError(f"Kafka: {error}") from None
        if start is not None and start.partitions:
            self._records = start.records
            self._next = {(topic, partition): offset for topic, partition, offset in start.partitions}
            self._consumer.assign([TopicPartition(*each) for each in start.partitions])
        else:
            self._consumer.subscribe(names)

    @property
    def position(self) -> Position:
        """The message that comes next in each partition read so far."""
        partitions = tuple((topic, partition, offset) for (topic, partition), offset in sorted(self._next.items()))
        return Position(self._records, 0, partitions)

    @property
    def progress(self) -> tuple[int, int | None]:
        """Records taken so far; a topic has no end."""
        return self._records, None

    def close(self) -> None:
        """Leave the group; harmless when repeated."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close()

    def __next__(self) -> Records:
        last = time.monotonic()
        while self._consumer is not None:
            if self._damage is not None:
                raise DataError(self._damage)
            messages = self._poll()
            if messages:
                last = time.monotonic()
                records = self._unframed(messages)
                if len(records):
                    self._records += len(records)
                    return records
            elif self._stream_s is not None and time.monotonic() - last >= self._stream_s:
                self._check_heard()
                break
        raise StopIteration

    def _check_heard(self) -> None:
        """Refuse to end where nothing came because there is nobody to hear from, or nothing was asked for yet.

        Raises:
            UnavailableError: No broker answers, or the group has given out no partitions yet.
        """
        from confluent_kafka import KafkaException

        waited = f"within stream_timeout={1000 * (self._stream_s or 0):.0f} ms"
        try:
            self._consumer.list_topics(timeout=max(self._poll_s, 1.0))
        except KafkaException as failure:
            raise UnavailableError(f"Kafka: no broker of {self._servers} answers {waited}: {failure}") from None
        if not self._ended and not self._next and not self._consumer.assignment() and not self._consumer.memberid():
            raise UnavailableError(f"Kafka: the group {self._group!r} has given out no partitions {waited}")

    def _poll(self) -> list[Any]:
        """Up to a batch of messages: those that come before a wait times out or every partition is at its end."""
        from confluent_kafka import KafkaError, KafkaException

        found: list[Any] = []
        while len(found) < self._batch:
            try:
                arrived = self._consumer.consume(self._batch - len(found), 0.0 if found else self._poll_s)
            except KafkaException as failure:
                raise UnavailableError(f"Kafka: {failure}") from None
            if not arrived:
                break
            at_end = False
            for message in arrived:
                error = message.error()
                if error is None:
                    self._ended.discard((message.topic(), message.partition()))
                    found.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    self._ended.add((message.topic(), message.partition()))
                    at_end = True
                elif error.fatal() or not error.retriable():
                    raise UnavailableError(f"Kafka: {message.topic()}: {error.str()}")
                else:
                    _LOG.warning("Kafka: %s", error.str())
            if at_end and found and len(self._ended) >= len(self._consumer.assignment()):
                break
        return found

    def _unframed(self, messages: Sequence[Any]) -> Records:
        """The records of messages, up to one that is damaged if that is to be raised."""
        there = [message for message in messages if message.value() is not None]
        if len(there) < len(messages):  # tombstones: they are passed over, but they are read
            made = self._unframed(there) if there else Records.of([], self.kind)
            if self._damage is None:
                self._next.update({(each.topic(), each.partition()): each.offset() + 1 for each in messages})
            return made
        values = [message.value() for message in messages]
        places = [(message.topic(), message.partition()) for message in messages]
        offsets = [message.offset() for message in messages]
        sources = {place: index for index, place in enumerate(dict.fromkeys(places))}
        names = tuple(f"kafka {topic}[{partition}]" for topic, partition in sources)
        whole = Records.of(values, self.kind)
        index = np.array([sources[place] for place in places], np.int32)
        numbers = np.array(offsets, np.int64)
        good = len(messages)
        if self._framing is None:
            made = replace(whole, numbers=numbers, positions=np.zeros_like(numbers), sources=names, source_index=index)
        else:
            made, good = self._split(whole, self._framing, numbers, names, index)
        self._next.update({place: offset + 1 for place, offset in zip(places[:good], offsets, strict=False)})
        return made.take(made.lengths > 0) if self._filter_empty else made

    def _split(
        self, whole: Records, framing: Framing, numbers: Any, names: tuple[str, ...], index: Any
    ) -> tuple[Records, int]:
        """The records inside messages, and how many messages come before one whose damage is to be raised."""
        scratch = self._scratch
        good = len(whole)
        parts: list[tuple[Any, ...]] = []
        rows: list[Any] = []
        for row, (begin, size) in enumerate(zip(whole.offsets.tolist(), whole.lengths.tolist(), strict=True)):
            used = 0
            while used < size:
                split_frames(whole.buffer, begin + used, begin + size, framing, scratch)
                n = scratch.found
                if not n:
                    where = f"{names[index[row]]}: record {numbers[row]}, byte {used}"
                    message = f"{where}: {explain(scratch.status, size - used, scratch.need)}"
                    if self._skip_damage:
                        self.losses.add(message, size - used)
                    else:
                        self._damage, good = message, row
                    break
                keys = scratch.keys[:n].copy() if framing.lagrangex_header else np.zeros(n, np.uint32)
                starts = scratch.starts[:n] + used
                parts.append((scratch.offsets[:n] + (begin + used), scratch.lengths[:n].copy(), keys, starts))
                rows.append(np.full(n, row))
                used += scratch.used
            if self._damage is not None:
                break
        columns = [np.concatenate(each) for each in zip(*parts, strict=True)] if parts else [np.zeros(0, np.int64)] * 4
        chosen = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        made = Records(
            kind=self.kind,
            buffer=whole.buffer,
            offsets=columns[0],
            lengths=columns[1],
            source_keys=columns[2].astype(np.uint32),
            numbers=numbers[chosen],
            positions=columns[3],
            sources=names,
            source_index=index[chosen],
        )
        return made, good


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise InvalidRequestError(f"Kafka setting {_BATCH}={text!r}: a number from 1 up")
    return int(text)
