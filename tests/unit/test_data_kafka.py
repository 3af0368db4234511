"""Kafka topics as records, against the client library's built-in cluster, which speaks the real protocol."""

from __future__ import annotations

import logging
import struct

import pytest

pytest.importorskip("confluent_kafka")

from confluent_kafka import Producer

from trilith.data.formats.framing import Framing, frame_records
from trilith.data.formats.kafka import KafkaReader, client_settings
from trilith.data.formats.reading import Position
from trilith.data.pipeline.dataset import read_kafka
from trilith.data.records import Records
from trilith.errors import DataError, InvalidRequestError, UnavailableError
from trilith_services.local.supervisor import free_ports

PATIENT = {"message_poll_timeout": 300, "stream_timeout": 60_000, "group_id": "g"}
FIRST = Position(0, 0, (("t", 0, 0),))


@pytest.fixture
def broker():
    """A producer that holds a cluster of one broker, and its address."""
    producer = Producer({"test.mock.num.brokers": 1, "logger": logging.getLogger("mock")})
    try:
        (meta,) = producer.list_topics(timeout=60).brokers.values()
        yield producer, f"{meta.host}:{meta.port}"
    finally:
        producer.flush(5)


def send(producer, *messages, topic="t", partition=0):
    for message in messages:
        producer.produce(topic, message, partition=partition)
    assert producer.flush(60) == 0


def take(reader, count):
    """Chunks until there are so many records, and nothing comes behind them."""
    chunks = []
    while sum(map(len, chunks)) < count:
        chunks.append(next(reader))
    reader._stream_s = 0.3  # of patience, from here on
    assert list(reader) == []
    return chunks


def framed(*payloads, framing=None, keys=None):
    records = Records.of(payloads, "instance", source_keys=keys)
    return frame_records(records, framing or Framing()).tobytes()


def test_messages_hold_records_that_know_their_partition_and_offset(broker):
    producer, servers = broker
    send(producer, framed(b"a", b"bc"), framed(b"", b"def"))
    with KafkaReader("t", servers=servers, start=FIRST, poll_batch_size=1, **PATIENT) as reader:
        chunks = take(reader, 4)
        assert reader.position == Position(4, 0, (("t", 0, 2),))
    assert [chunk.payloads() for chunk in chunks] == [[b"a", b"bc"], [b"", b"def"]]
    assert chunks[1].where(1) == "kafka t[0]: record 1, byte 8"


def test_another_reader_goes_on_behind_the_last_chunk(broker):
    producer, servers = broker
    send(producer, *(framed(str(number).encode()) for number in range(5)))
    with KafkaReader("t", servers=servers, start=FIRST, poll_batch_size=2, **PATIENT) as reader:
        seen = next(reader).payloads()
        place = reader.position
    with KafkaReader("t", servers=servers, start=place, **PATIENT) as reader:
        seen += [payload for chunk in take(reader, 5 - len(seen)) for payload in chunk.payloads()]
    assert seen == [b"0", b"1", b"2", b"3", b"4"]


def test_a_group_shares_all_partitions_and_frames_may_have_headers(broker):
    producer, servers = broker
    framing = Framing(lagrangex_header=True)
    for partition in range(2):
        send(producer, framed(b"x%d" % partition, framing=framing, keys=[256]), partition=partition)
    configuration = ["auto.offset.reset=earliest"]
    # The group gives partitions out after three seconds of waiting for members.
    with KafkaReader(["t"], servers=servers, framing=framing, configuration=configuration, **PATIENT) as reader:
        chunks = take(reader, 2)
    whole = Records.concatenate(chunks)
    assert sorted(whole.payloads()) == [b"x0", b"x1"]
    assert whole.source_keys.tolist() == [256, 256]


def test_without_frames_a_message_is_a_record_and_empty_ones_can_be_dropped(broker):
    producer, servers = broker
    send(producer, b"whole", b"", b"message")
    for filter_empty, wanted in ((False, [b"whole", b"", b"message"]), (True, [b"whole", b"message"])):
        options = {"kind": "plaintext", "unframe": False, "filter_empty": filter_empty, "start": FIRST}
        with KafkaReader("t", servers=servers, **options, **PATIENT) as reader:
            assert [payload for chunk in take(reader, len(wanted)) for payload in chunk.payloads()] == wanted


@pytest.mark.parametrize("unframe", [False, True])
def test_a_tombstone_holds_no_record_but_is_passed(broker, unframe):
    producer, servers = broker
    wrap = framed if unframe else bytes
    send(producer, None, wrap(b"one"), None, wrap(b"two"), None)
    options = {"kind": "plaintext", "unframe": unframe, "start": FIRST}
    with KafkaReader("t", servers=servers, **options, **PATIENT) as reader:
        assert [payload for chunk in take(reader, 2) for payload in chunk.payloads()] == [b"one", b"two"]
        assert reader.position.partitions == (("t", 0, 5),)


def test_a_topic_without_messages_ends_and_a_cluster_without_brokers_is_an_error(broker):
    producer, servers = broker
    send(producer, framed(b"a"))
    end = Position(0, 0, (("t", 0, 1),))
    short = {"message_poll_timeout": 200, "stream_timeout": 400, "group_id": "g"}
    with KafkaReader("t", servers=servers, start=end, **short) as reader:
        assert list(reader) == []
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    for start in (None, FIRST):
        with KafkaReader("t", servers=nobody, start=start, **short) as reader:
            with pytest.raises(UnavailableError, match=f"no broker of {nobody} answers within stream_timeout=400 ms"):
                next(reader)
    with pytest.raises(UnavailableError, match="no broker"):
        list(read_kafka("t", servers=nobody, **short).batch(3))


def test_a_damaged_message_is_raised_behind_what_is_good_or_costs_its_own_rest(broker):
    producer, servers = broker
    send(producer, framed(b"a") + struct.pack("<Q", 2**63) + b"rest", framed(b"b"))
    with KafkaReader("t", servers=servers, start=FIRST, **PATIENT) as reader:
        assert next(reader).payloads() == [b"a"]
        assert reader.position.partitions == FIRST.partitions
        with pytest.raises(DataError, match=r"kafka t\[0\]: record 0, byte 9: .*longer"):
            next(reader)
    with KafkaReader("t", servers=servers, start=FIRST, on_error="skip", **PATIENT) as reader:
        assert [payload for chunk in take(reader, 2) for payload in chunk.payloads()] == [b"a", b"b"]
        assert (reader.losses.records, reader.losses.bytes) == (1, 12)


def test_settings_are_read_in_the_references_order():
    settings = client_settings(
        group_id="g",
        servers="s:1",
        poll_batch_size=7,
        configuration=["group.id=other", "conf.topic.auto.offset.reset=earliest", "enable.partition.eof=false"],
        kafka_other_metadata="a.b=c,batch.num.messages=9",
    )
    assert settings == {
        "bootstrap.servers": "s:1",
        "group.id": "g",
        "batch.num.messages": "9",
        "auto.offset.reset": "earliest",
        "enable.partition.eof": "true",
        "a.b": "c",
    }
    assert client_settings()["batch.num.messages"] == "1024"


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"stream_timeout": -2}, "stream_timeout=-2"),
        ({"message_poll_timeout": 0}, "message_poll_timeout=0"),
        ({"configuration": ["nonsense"]}, "'nonsense'"),
        ({"configuration": ["no.such.setting=1"]}, "no.such.setting"),
        ({"kafka_other_metadata": "batch.num.messages=0"}, "batch.num.messages='0'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, wrong):
    with pytest.raises(InvalidRequestError, match=wrong):
        KafkaReader("t", **options)
