"""Who owns what."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith import routing
from trilith.routing import MAX_PARTITION_FLOATS


@given(ids=st.lists(st.integers(0, 2**64 - 1), max_size=30), count=st.integers(1, 9))
def test_the_owner_of_an_id_is_its_unsigned_value_modulo_the_number_of_ps(ids, count):
    assert routing.owners(np.array(ids, np.uint64), count).tolist() == [each % count for each in ids]


def test_ids_are_unsigned_for_their_owner():
    assert routing.owners(np.array([-1], np.int64).view(np.uint64), 7).tolist() == [(2**64 - 1) % 7]


@given(name=st.text(max_size=9), partition=st.integers(0, 9), count=st.integers(1, 9))
def test_partitions_of_a_variable_live_on_neighbouring_ps(name, partition, count):
    want = (google_crc32c.value(name.encode()) + partition) % count
    assert routing.partition_owner(name, partition, count) == want


@pytest.mark.parametrize(
    ("floats", "count", "sizes"),
    [
        (0, 3, [0]),
        (7, 3, [7]),
        (MAX_PARTITION_FLOATS, 3, [MAX_PARTITION_FLOATS]),
        (MAX_PARTITION_FLOATS + 1, 1, [MAX_PARTITION_FLOATS + 1]),
        (MAX_PARTITION_FLOATS + 1, 2, [MAX_PARTITION_FLOATS // 2 + 1, MAX_PARTITION_FLOATS // 2]),
    ],
)
def test_variables_over_four_mebibytes_are_cut_into_one_partition_per_ps(floats, count, sizes):
    assert routing.partition_sizes(floats, count) == sizes
