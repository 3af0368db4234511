"""Features that are asked for and not there, or not what was asked for: never silently empty."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trilith.data
from trilith.data import Column, Dense, Extra, InstanceWeight, Label, ParseSpec, Records, Slot, Sparse
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.strings import HashedIds, hash_strings
from trilith_proto import tf_example_pb2
from trilith_proto.example_pb2 import Example, ExampleBatch
from trilith_proto.proto_parser_pb2 import Instance


def example(**features):
    made = Example()
    for name, (member, values) in features.items():
        getattr(made.named_feature.add(name=name).feature, member).value.extend(values)
    return made.SerializeToString()


def instance(**features):
    made = Instance()
    for name, (member, values) in features.items():
        getattr(made.feature.add(name=name), member).extend(values)
    return made.SerializeToString()


def batch(**features):
    made = ExampleBatch(batch_size=1)
    for name, (member, values) in features.items():
        getattr(made.named_feature_list.add(name=name).feature.add(), member).value.extend(values)
    return made.SerializeToString()


def parsed(payloads, kind, spec, **options):
    return ParseSpec(spec, **options).parse(Records.of(payloads, kind))


MAKERS = {"example": example, "examplebatch": batch}


@pytest.mark.parametrize("kind", ["example", "examplebatch"])
def test_integers_are_ids(kind):
    make = MAKERS[kind]
    rows = [("int64_list", [7, -1]), ("fid_v2_list", [2**63 + 9]), ("fid_v1_list", [1 << 54 | 5]), ("int64_list", [])]
    found = parsed([make(u=row) for row in rows], kind, {"u": Sparse()})["u"]
    assert found.tolist() == [[7, -1], [2**63 + 9 - 2**64], [1 << 48 | 5], []]


@pytest.mark.parametrize("kind", ["example", "examplebatch"])
def test_integers_are_ids_and_dense_at_once(kind):
    make = MAKERS[kind]
    found = parsed(
        [make(u=("int64_list", [7])), make(u=("int64_list", [8]))],
        kind,
        {"u": Sparse(), "n": Dense(1, "int64", "u"), "f": Dense(feature="u")},
    )
    assert found["u"].tolist() == [[7], [8]]
    assert found["n"].tolist() == [[7], [8]]
    assert found["f"].tolist() == [[7.0], [8.0]]
    assert found["f"].dtype == np.float32


@pytest.mark.parametrize(("make", "kind"), [(example, "example"), (batch, "examplebatch")])
@pytest.mark.parametrize(
    ("held", "why"),
    [
        (("float_list", [7.0]), r"feature 'u' holds a float_list, .*Column\('u', 'fid_v2'\)"),
        (("double_list", [7.0]), "holds a double_list"),
        (("bytes_list", [b"a"]), "holds a bytes_list, .*(dictionary or a hash|strings=True)"),
    ],
)
def test_what_is_no_id_is_refused_by_name_and_record(make, kind, held, why):
    payloads = [make(u=("fid_v2_list", [1])), make(u=held)]
    with pytest.raises(DataError, match=f"record 1, .*{why}"):
        parsed(payloads, kind, {"u": Sparse()})


@pytest.mark.parametrize(("make", "kind", "field"), [(example, "example", ("bytes_list", "fid_v2_list")),
                                                     (instance, "instance", ("bytes_value", "fid"))])  # fmt: skip
def test_strings_are_their_hashes_where_they_are_allowed(make, kind, field):
    texts, ids = field
    records = [make(u=(ids, [3])), make(u=(texts, [b"a", "東京".encode()])), make(), make(u=(texts, [b""]))]
    spec = ParseSpec({"u": Sparse(strings=True), "v": Sparse("w", strings=True)})
    for _ in range(2):  # a parser that has seen strings reads on
        found = spec.parse(Records.of(records, kind))
        hashed = hash_strings(["a", "東京", ""]).view(np.int64).tolist()
        assert found["u"].tolist() == [[3], hashed[:2], [], hashed[2:]]
        assert isinstance(found["u"], HashedIds)
        assert not isinstance(found["v"], HashedIds)
    assert spec.parse(Records.of([make(w=(texts, [b"b"]))], kind))["v"].tolist() == [
        hash_strings(["b"]).view(np.int64).tolist()
    ]
    assert not isinstance(spec.parse(Records.of([make(u=(ids, [3]))], kind))["u"], HashedIds)


def test_ids_and_text_in_one_feature_are_damage():
    made = Instance()
    made.feature.add(name="u", fid=[5], bytes_value=[b"a"])
    records = [made.SerializeToString(), instance(u=("bytes_value", [b"b"]))]
    with pytest.raises(DataError, match="record 0, .*feature 'u' holds ids and text at once"):
        ParseSpec({"u": Sparse(strings=True)}).parse(Records.of(records, "instance"))
    skips = ParseSpec({"u": Sparse(strings=True)}, on_error="skip")
    assert skips.parse(Records.of(records, "instance"))["u"].tolist() == [hash_strings(["b"]).view(np.int64).tolist()]


@pytest.mark.parametrize("held", [("float_value", [7.0]), ("int64_value", [7]), ("bytes_value", [b"a"])])
def test_what_is_no_fid_of_an_instance_is_refused(held):
    with pytest.raises(DataError, match=f"record 1, .*feature 'u' holds a {held[0]}, .*no ids"):
        parsed([instance(u=("fid", [1])), instance(u=held)], "instance", {"u": Sparse()})


def test_an_instance_whose_feature_holds_several_kinds_is_read_by_the_one_wanted():
    made = Instance()
    made.feature.add(name="u", fid=[5], float_value=[0.5], int64_value=[9])
    spec = {"u": Sparse(), "f": Dense(feature="u"), "n": Dense(1, "int64", "u")}
    found = parsed([made.SerializeToString()], "instance", spec)
    assert (found["u"].tolist(), found["f"].tolist(), found["n"].tolist()) == ([[5]], [[0.5]], [[9]])


@pytest.mark.parametrize(
    ("payload", "kind", "spec", "why"),
    [
        (instance(x=("fid", [1])), "instance", Dense(), "holds a fid, which is no list of float"),
        (instance(x=("bytes_value", [b"text"])), "instance", Dense(), "holds a bytes_value, which is no list of float"),
        (instance(x=("float_value", [1.0])), "instance", Dense(1, "int64"), "holds a float_value"),
        (instance(x=("float_value", [1.0, 2.0])), "instance", Dense(), r"2 values where Dense\(1\) takes 1"),
        (example(x=("fid_v2_list", [1])), "example", Dense(), "holds a fid_v2_list, which is no list of float"),
        (example(x=("float_list", [1.0])), "example", Dense(1, "int64"), "holds a float_list, which is no list of int"),
        (example(x=("float_list", [1.0])), "example", Dense(3), r"1 values where Dense\(3\) takes 3.*lengths='fit'"),
        (example(x=("int64_list", [1, 2])), "example", Dense(1), r"2 values where Dense\(1\) takes 1"),
        (example(x=("double_list", [1e39])), "example", Dense(1), r"\[1e\+39\] is beyond float32"),
        (batch(x=("float_list", [1.0])), "examplebatch", Dense(3), r"1 values where Dense\(3\) takes 3"),
        (example(__LABEL__=("int64_list", [1])), "example", Label(), "'__LABEL__' holds a int64_list"),
    ],
)
def test_dense_values_that_do_not_fit_are_refused(payload, kind, spec, why):
    with pytest.raises(DataError, match=f"record 0, .*{why}"):
        parsed([payload], kind, {"x": spec})


@pytest.mark.parametrize(
    ("make", "member", "kind"),
    [(instance, "float_value", "instance"), (example, "float_list", "example"), (batch, "float_list", "examplebatch")],
)
def test_dense_values_are_cut_and_filled_up_where_that_is_declared(make, member, kind):
    payloads = [make(x=(member, values)) for values in ([1.0], [1.0, 2.0], [1.0, 2.0, 3.0])]
    found = parsed(payloads, kind, {"x": Dense(2, lengths="fit")})
    assert found["x"].tolist() == [[1, 0], [1, 2], [1, 2]]


@pytest.mark.parametrize(("make", "kind"), [(example, "example"), (batch, "examplebatch")])
def test_an_empty_list_is_no_number(make, kind):
    """A null cell of a column of floats is zero, not the smallest float that the reference puts there."""
    payload = make(x=("float_list", []), instance_weight=("float_list", []))
    found = parsed([payload], kind, {"x": Dense(), "w": InstanceWeight()})
    assert (found["x"].tolist(), found["w"].tolist()) == ([[0.0]], [[1.0]])


def test_an_infinite_double_is_no_overflow():
    found = parsed([example(x=("double_list", [np.inf]))], "example", {"x": Dense()})
    assert found["x"].tolist() == [[np.inf]]


def test_records_that_do_not_fit_are_skipped_and_counted(caplog):
    payloads = [example(u=("int64_list", [1]), x=("float_list", [0.5]))] * 3
    payloads[1] = example(u=("bytes_list", [b"a"]), x=("float_list", [0.5]))
    payloads.append(example(u=("int64_list", [2]), x=("float_list", [0.5, 1.0])))
    spec = ParseSpec({"u": Sparse(), "x": Dense()}, on_error="skip")
    with caplog.at_level(logging.WARNING, "trilith.data"):
        found = spec.parse(Records.of(payloads, "example"))
    assert "record 1, byte" in caplog.text
    assert "feature 'u' holds a bytes_list" in caplog.text
    assert (found["u"].tolist(), found["x"].tolist(), spec.skipped) == ([[1], [1]], [[0.5], [0.5]], 2)


def test_integer_labels_and_weights_are_numbers():
    payloads = [
        example(label=("int64_list", [1]), instance_weight=("int64_list", [3])),
        example(label=("float_list", [0.5])),
    ]
    found = parsed(payloads, "example", {"y": Label(), "w": InstanceWeight()})
    assert found["y"].tolist() == [[1], [0.5]]


def test_labels_of_batches_may_be_called_label():
    payload = batch(label=("int64_list", [1]))
    assert parsed([payload], "examplebatch", {"y": Label()})["y"].tolist() == [[1]]
    payload = batch(label=("int64_list", [1]), __LABEL__=("float_list", [0.5]))
    assert parsed([payload], "examplebatch", {"y": Label()})["y"].tolist() == [[0.5]]


@pytest.fixture
def tables(tmp_path):
    pq.write_table(pa.table({"user": [7, 8], "label": [1, 0]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"user": [9], "label": [1], "new": [5]}), tmp_path / "1.parquet")
    return str(tmp_path / "*.parquet")


def batches(samples):
    return list(samples.batch(2))


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ({"usr": Sparse()}, "'usr': no column"),
        ({"age": Dense()}, "'age': no column"),
        ({"id": Sparse("usr")}, r"'usr' \(for 'id'\): no column"),
        ({"uid": Extra()}, r"'__UID__' \(for 'uid'\): no column"),
    ],
)
def test_a_name_that_is_no_column_is_refused_with_those_that_are(tmp_path, file_format, spec, wrong):
    path = tmp_path / f"t.{file_format}"
    if file_format == "csv":
        path.write_text("user,label\n7,1\n")
    else:
        pq.write_table(pa.table({"user": [7], "label": [1]}), path)
    samples = trilith.data.read(str(path))
    with pytest.raises(InvalidRequestError, match=rf"{wrong} of the files read; there are \['label', 'user'\]"):
        batches(samples.parse({"user": Sparse(), **spec}))
    assert len(batches(samples.parse({"user": Sparse(), **spec}, absent="allow"))) == 1


def test_labels_that_no_column_has_are_refused(tmp_path):
    pq.write_table(pa.table({"user": [7], "click": [1]}), tmp_path / "t.parquet")
    with pytest.raises(InvalidRequestError, match="'__LABEL__' or 'label'.*no column"):
        batches(trilith.data.read(str(tmp_path / "t.parquet")).parse({"user": Sparse(), "y": Label()}))


def test_a_column_of_some_files_is_empty_in_the_others(tables):
    found = batches(trilith.data.read(tables).parse({"new": Sparse(), "y": Label()}))
    assert [each["new"].tolist() for each in found] == [[[], []], [[5]]]
    with pytest.raises(InvalidRequestError, match=r"'nwe': no column .*there are \['label', 'new', 'user'\]"):
        batches(trilith.data.read(tables).parse({"nwe": Sparse()}))


def test_a_parser_that_was_used_is_copied_without_its_tables(tables):
    spec = ParseSpec(user=Sparse())
    samples = trilith.data.read(tables).parse(spec)
    wanted = [each["user"].tolist() for each in batches(samples)]
    sent = copy.deepcopy(spec)
    assert sent._parsers == {}
    assert [each["user"].tolist() for each in batches(trilith.data.read(tables).parse(sent))] == wanted


def test_a_given_parser_is_watched_too(tables):
    with pytest.raises(InvalidRequestError, match="'usr': no column"):
        batches(trilith.data.read(tables).parse(ParseSpec(usr=Sparse())))


@pytest.mark.parametrize(
    ("payload", "kind", "spec"),
    [
        (example(user=("int64_list", [1])), "example", {"usr": Sparse()}),
        (instance(user=("fid", [1])), "instance", {"usr": Sparse()}),
        (batch(user=("int64_list", [1])), "examplebatch", {"usr": Sparse()}),
        (instance(user=("fid", [1])), "instance", {"usr": Slot(3)}),
        (instance(user=("fid", [1])), "instance", {"usr": Label()}),
    ],
)
def test_a_feature_of_no_record_is_told(caplog, payload, kind, spec):
    samples = trilith.data.from_records([payload] * 3, kind)
    with caplog.at_level(logging.WARNING, "trilith.data"):
        batches(samples.parse(spec))
    (message,) = [each.getMessage() for each in caplog.records]
    assert "none of 3 records has it; there are ['user']" in message
    with pytest.raises(InvalidRequestError, match="none of 3 records has it"):
        batches(samples.parse(spec, absent="raise"))
    caplog.clear()
    batches(samples.parse(spec, absent="allow"))
    assert not caplog.records


def test_a_rare_feature_is_not_told(caplog):
    payloads = [example(user=("int64_list", [1]))] * 3 + [example(rare=("int64_list", [1]))]
    with caplog.at_level(logging.WARNING, "trilith.data"):
        batches(trilith.data.from_records(payloads, "example").parse({"rare": Sparse()}))
    assert not caplog.records


def test_an_absent_feature_is_told_behind_many_records(caplog):
    samples = trilith.data.from_records([example(user=("int64_list", [1]))] * 12_000, "example")
    iterator = iter(samples.parse({"usr": Sparse()}).batch(1000))
    with caplog.at_level(logging.WARNING, "trilith.data"):
        for _ in range(9):
            next(iterator)
        assert not caplog.records
        next(iterator)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", ["example", "instance", "examplebatch"])
@pytest.mark.parametrize("value", [7, 700])
def test_tf_examples_read_as_something_else_name_their_converter(tmp_path, kind, value):
    message = tf_example_pb2.Example()
    message.features.feature["user"].int64_list.value.append(value)
    with trilith.data.open_writer(str(tmp_path / "t.tfrecord"), format="tfrecord") as out:
        out.write(Records.of([message.SerializeToString()] * 3, "plaintext"))
    with pytest.raises(DataError, match="record 0, .*TFExampleConverter"):
        batches(trilith.data.read(str(tmp_path / "t.tfrecord"), kind=kind).parse({"user": Sparse()}))


def test_absent_is_one_of_a_few_words():
    with pytest.raises(InvalidRequestError, match="absent='skip'"):
        trilith.data.from_records([], "example").parse({"u": Sparse()}, absent="skip")
    with pytest.raises(InvalidRequestError, match="lengths='pad'"):
        Dense(1, lengths="pad")


def test_a_column_that_cannot_be_read_is_no_hindrance_until_it_is_wanted(tmp_path):
    table = pa.table({"u": [1], "m": pa.array([[(1, 2)]], pa.map_(pa.int64(), pa.int64()))})
    pq.write_table(table, tmp_path / "t.parquet")
    samples = trilith.data.read(str(tmp_path / "t.parquet"))
    assert batches(samples.parse({"u": Sparse()}))[0]["u"].tolist() == [[1]]
    with pytest.raises(InvalidRequestError, match="column 'm' is stored as map"):
        batches(samples.parse({"m": Sparse()}))
    with pytest.raises(InvalidRequestError, match="column 'm' is stored as map"):
        batches(trilith.data.read(str(tmp_path / "t.parquet"), columns=[Column("m", "int")]))


def test_ids_of_any_kind_and_number_are_those_of_the_messages():
    """Integers take a byte or ten in a record; features occur twice, which the library settles."""
    draw = np.random.default_rng(5)
    payloads, wanted = [], []
    for size in (0, 1, 3, 50_000, 2, 7, 20_000):
        made, ids = Example(), []
        for _ in range(int(draw.integers(1, 3))):
            feature = made.named_feature.add(name="u").feature
            values = draw.integers(-(2**63), 2**63 - 1, size) >> draw.integers(0, 63, size)
            if draw.integers(2):
                feature.int64_list.value.extend(values.tolist())
            else:
                feature.fid_v2_list.value.extend(values.view(np.uint64).tolist())
            ids = values.tolist()  # the last of a name counts
            made.named_feature.add(name=f"other {size}").feature.int64_list.value.append(1)
        payloads.append(made.SerializeToString())
        wanted.append(ids)
    spec = ParseSpec({"u": Sparse()})
    for part in (slice(0, 3), slice(0, 7), slice(3, 4), slice(4, 7)):
        assert spec.parse(Records.of(payloads[part], "example"))["u"].tolist() == wanted[part]


def test_a_label_column_of_another_name_is_pointed_to(tmp_path):
    pq.write_table(pa.table({"user": [7], "click": [1]}), tmp_path / "t.parquet")
    samples = trilith.data.read(str(tmp_path / "t.parquet"))
    with pytest.raises(InvalidRequestError, match=r"Dense\(\) reads 'click' as numbers"):
        batches(samples.parse({"user": Sparse(), "click": Label()}))
    (batch,) = batches(samples.parse({"click": Dense()}))
    assert batch["click"].tolist() == [[1.0]]
