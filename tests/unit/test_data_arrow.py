"""Datasets of what Arrow can read: every form of it gives the same rows, in the same order, again from any place."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from tests.absent import optional
from trilith.data import Dense, Extra, Label, Ragged, Records, Sparse, from_arrow, from_json, hash_strings, to_json
from trilith.data.formats.arrow_rows import ArrowRows
from trilith.errors import DataError, InvalidRequestError

ROWS = 50


def table(rows: int = ROWS) -> pa.Table:
    return pa.table(
        {
            "id": pa.array(range(rows), pa.int64()),
            "word": pa.array([None if n % 7 == 0 else f"w{n % 5}" for n in range(rows)]),
            "tags": pa.array([None if n % 5 == 0 else list(range(n % 4)) for n in range(rows)], pa.list_(pa.int32())),
            "price": pa.array([n / 4 for n in range(rows)], pa.float32()),
            "label": pa.array([n % 2 for n in range(rows)], pa.int8()),
        }
    )


class OfHub:
    """A dataset of Hugging Face, as far as it is asked."""

    def with_format(self, kind: str) -> OfHub:
        assert kind == "arrow"
        return self

    def iter(self, batch_size: int) -> Any:
        return (table().slice(start, 20) for start in range(0, ROWS, 20))


class OfRay:
    """A dataset of Ray, as far as it is asked."""

    def iter_batches(self, *, batch_format: str, batch_size: int) -> Any:
        assert batch_format == "pyarrow"
        return iter(table().to_batches(max_chunksize=9))


def polars() -> Any:
    return optional("polars").from_arrow(table())


def pandas() -> Any:
    optional("pandas")
    return table().to_pandas(types_mapper={pa.int64(): None}.get, integer_object_nulls=True)


def hub() -> Any:
    return optional("datasets").Dataset(pa.table(table()))


def files(path: Any) -> Any:
    for part in range(3):
        pq.write_table(table().slice(part * 20, 20), path / f"part-{part}.parquet", row_group_size=6)
    return pads.dataset(path)


FORMS = {
    "a table": lambda path: table(),
    "a chunked table": lambda path: pa.concat_tables([table().slice(0, 11), table().slice(11, 2), table().slice(13)]),
    "a record batch": lambda path: table().to_batches()[0],
    "a list of batches": lambda path: table().to_batches(max_chunksize=7),
    "a dataset": files,
    "a scanner": lambda path: lambda: files(path).scanner(batch_size=4),
    "a function that makes readers": lambda path: lambda: table().to_reader(6),
    "of the hub": lambda path: OfHub(),
    "of ray": lambda path: OfRay(),
    "polars": lambda path: polars(),
    "pandas": lambda path: pandas(),
    "hugging face": lambda path: hub(),
    "views": lambda path: table().cast(
        pa.schema({**dict(zip(table().schema.names, table().schema.types, strict=True)), "word": pa.string_view()})
    ),
    "dictionaries": lambda path: table().set_column(1, "word", table().column("word").dictionary_encode()),
}


def rows_of(dataset: Any) -> list[dict[str, Any]]:
    return [row for batch in dataset for row in batch.table.to_pylist()]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_rows_again_from_any_place(form, tmp_path):
    data = form(tmp_path)
    want = table().to_pylist()
    whole = from_arrow(data).batch(8)
    assert rows_of(whole) == want
    assert rows_of(whole) == want  # a second pass
    shuffled = from_arrow(data).shuffle(16, seed=3).batch(8)
    before = shuffled.iterate(epoch=1)
    first = [next(before).table.to_pylist() for _ in range(2)]
    state = to_json(before.state_dict())
    rest = [batch.table.to_pylist() for batch in before]
    again = from_arrow(data).shuffle(16, seed=3).batch(8).iterate(state=from_json(state))
    assert [batch.table.to_pylist() for batch in again] == rest
    given = [row["id"] for part in (*first, *rest) for row in part]
    assert sorted(given) == list(range(ROWS))
    assert given != list(range(ROWS))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_parsers_see_lists_as_ragged_nulls_as_absent_and_strings_as_hashes(form, tmp_path):
    data = from_arrow(form(tmp_path), columns=["word", "tags", "price", "label"])
    specs = {"word": Sparse(), "tags": Sparse(), "price": Dense(), "label": Label()}
    batches = list(data.parse(specs).batch(30))
    want = table().to_pylist()
    words = [
        row
        for batch in batches
        for row in Ragged(batch["word"].values.view(np.uint64), batch["word"].row_splits).tolist()
    ]
    assert words == [[] if row["word"] is None else hash_strings([row["word"]]).tolist() for row in want]
    assert [row for batch in batches for row in batch["tags"].tolist()] == [row["tags"] or [] for row in want]
    assert [row for batch in batches for row in batch["price"].tolist()] == [[row["price"]] for row in want]
    assert [row for batch in batches for row in batch["label"].tolist()] == [[row["label"]] for row in want]


def test_a_batch_that_is_a_slice_shares_the_memory_of_the_table():
    whole = table()
    first, second, *_ = from_arrow(whole).batch(10)
    for batch, start in ((first, 0), (second, 10)):
        found = batch.column("price").to_numpy()
        assert found.ctypes.data == whole.column("price").chunk(0).to_numpy()[start:].ctypes.data


def test_shares_of_ranks_and_of_workers_are_all_rows_once():
    for by in (None, "records"):
        shares = [
            [row["id"] for row in rows_of(from_arrow(table()).shard(rank, 3, by=by).batch(4))] for rank in range(3)
        ]
        assert shares == [list(range(rank, ROWS, 3)) for rank in range(3)]
    loader = DataLoader(from_arrow(table()).batch(4).torch(), batch_size=None, num_workers=2)
    assert sorted(row["id"] for row in rows_of(loader)) == list(range(ROWS))
    with pytest.raises(InvalidRequestError, match="'records', or 'files' where files are read"):
        from_arrow(table()).shard(0, 2, by="files")


def test_rows_are_filtered_counted_merged_and_taken_as_any():
    assert len(from_arrow(table())) == ROWS
    assert len(from_arrow(table()).batch(8)) == 7
    few = from_arrow(table()).filter(lambda rows: rows.numbers % 5 == 1).skip(1).take(3)
    assert [row["id"] for row in rows_of(few.batch(10))] == [6, 11, 16]
    merged = from_arrow(table(2)).merge(from_arrow(table(3))).batch(10)
    assert [row["id"] for row in rows_of(merged)] == [0, 0, 1, 1, 2]
    (mixed,) = from_arrow(table(2)).merge(from_arrow(table(2).select(["id"]))).parse({"id": Sparse()}).batch(10)
    assert mixed["id"].tolist() == [[0], [0], [1], [1]]


def test_rows_become_examples_where_bytes_are_asked_for():
    payloads = list(from_arrow(table(3)))
    (batch,) = from_arrow(table(3)).parse({"id": Sparse(), "price": Dense()}).batch(3)
    again = ArrowRows(table(3), np.arange(3)).encoded()
    assert isinstance(again, Records)
    assert payloads == again.payloads()
    assert batch["price"].tolist() == [[0.0], [0.25], [0.5]]


def test_a_part_of_a_table_is_sent_alone():
    rows = ArrowRows(table(20_000), np.arange(20_000)).take(slice(7, 9))
    assert len(rows.packed()["stream"]) < 10_000
    assert copy.deepcopy(rows).table.equals(rows.table)


def test_columns_of_line_ids_and_strings_as_bytes():
    data = pa.table({"__UID__": [5, 6], "name": ["a", "b"]})
    (batch,) = from_arrow(data, strings="bytes").parse({"uid": Extra(), "name": Dense(1, "string")}).batch(2)
    assert batch["uid"].tolist() == [[5], [6]]
    assert batch["name"].tolist() == [[b"a"], [b"b"]]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: from_arrow(7), "a int is nothing that Arrow reads"),
        (lambda: from_arrow(from_arrow(table())), "this is a Dataset already"),
        (lambda: from_arrow(table(), strings="ids"), "strings='ids' is neither 'hash' nor 'bytes'"),
        (lambda: list(from_arrow(table(), columns=["id", "x"]).batch(2)), "no column 'x'; there are \\['id', 'word'"),
        (lambda: list(from_arrow([{"id": 1}]).batch(2)), "an iterable of dict; it takes record batches, tables"),
        (lambda: list(from_arrow(lambda: 7).batch(2)), "made a int, which Arrow cannot read"),
        (lambda: list(from_arrow(table()).parse({"x": Sparse()}).batch(2)), "no column 'x'|'x'"),
        (lambda: [list(each) for each in [from_arrow(iter(table().to_batches())).batch(2)] * 2], "ends after one pass"),
        (lambda: from_arrow(table()).share("static://x:1", "q"), "share works where files are read"),
    ],
)
def test_what_cannot_be_is_one_line(make, said):
    with pytest.raises(InvalidRequestError, match=said):
        make()


def test_a_value_that_does_not_fit_names_its_row():
    with pytest.raises(DataError, match=r"\(arrow\): record 1, byte 0: column 'x': 1e\+39 is beyond float32"):
        list(from_arrow(pa.table({"x": [1.0, 1e39]})).parse({"x": Dense()}).batch(2))
