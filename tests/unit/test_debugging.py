"""debugging_info.pb: what the chief leaves behind for those who want to look into its cluster."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from google.protobuf import text_format

import trilith
from tests.congruence.clusters import LocalCluster
from tests.consoles import open_console
from trilith.client import Client
from trilith.errors import InvalidRequestError, UnavailableError
from trilith.serving.debugging import DEBUGGING_INFO, read_debugging_info, write_debugging_info
from trilith.tables import Sgd
from trilith_proto import ps_pb2
from trilith_proto.debugging_info_pb2 import DebuggingInfo
from trilith_services.ps.process.server import ParameterServer
from trilith_services.ps.process.shard import LocalShard


@pytest.fixture
def client() -> Iterator[Client]:
    """Of two PS with a table that two features share."""
    servers = [ParameterServer(LocalShard(index=index, count=2, threads=1)) for index in (0, 1)]
    address = "static://" + ",".join(f"127.0.0.1:{server.start()}" for server in servers)
    with trilith.connect(address) as client:
        client.table("who", dim=2, optimizer=Sgd(learning_rate=0.5)).assign([5, 6], [[1.0, 2.0], [3.0, 4.0]])
        client.record_features({"viewer": "who", "author": "who"})
        yield client
    for server in servers:
        server.stop()


def test_the_file_has_the_fields_that_debugging_servers_expect(client, tmp_path) -> None:
    write_debugging_info(str(tmp_path), client, num_workers=3, chief="10.0.0.1:2222")
    info = DebuggingInfo.FromString((tmp_path / DEBUGGING_INFO).read_bytes())
    assert (info.cluster.chief_addr, list(info.cluster.ps_addrs)) == ("10.0.0.1:2222", client.addresses)
    assert info.num_workers == 3
    assert [each.feature_name for each in info.feature_name_configs] == ["author", "viewer"]
    texts = {each.config_str for each in info.feature_name_configs}
    assert len(texts) == 1  # features of one table have one config
    assert text_format.Parse(texts.pop(), ps_pb2.TableConfig()) == client.describe()[0].tables[0]
    numbers = {field.name: field.number for field in DebuggingInfo.DESCRIPTOR.fields}
    assert numbers == {"cluster": 1, "num_workers": 2, "feature_name_configs": 3}


def test_a_console_finds_the_cluster_and_its_features_by_it(client, tmp_path) -> None:
    write_debugging_info(str(tmp_path), client, num_workers=1)
    found = read_debugging_info(str(tmp_path))
    assert found.features == {"viewer": "who", "author": "who"}
    with open_console(found.cluster, features=found.features) as console:
        console.until(lambda look: look["totals"]["alive"] == 2)
        shown = console.debug("features", {"feature_names": ["viewer", "author", "?"], "feature_ids": [5, 6, 5]})
    assert set(shown) == {"viewer", "author"}
    assert shown["author"]["6"].startswith("id: 6\nnum: 3.0\nnum: 4.0\n")


def test_a_job_says_where_its_rows_are_before_it_trains(tmp_path) -> None:
    pytest.importorskip("torch")
    from tests.tasks import everything
    from trilith.estimator import RunConfig

    with LocalCluster("3-ps") as cluster:
        with everything(RunConfig(cluster=cluster.address, model_dir=str(tmp_path), progress="none")) as job:
            with pytest.raises(InvalidRequestError, match="no iterable"):
                job.train(7)
        found = read_debugging_info(str(tmp_path))
        assert found.cluster == cluster.address
    items, cities = dict.fromkeys(("item", "seen"), "item"), dict.fromkeys(("city", "places"), "city")
    tags = dict.fromkeys(("tags", "tag_sum", "tag_root", "tag_sums"), "tags")
    alone = {name: name for name in ("user", "decade", "idle")}
    assert found.features == items | cities | tags | alone


def test_an_embedded_cluster_leaves_no_word_because_nobody_could_reach_it(tmp_path) -> None:
    with trilith.connect("local://") as client:
        client.table("who", dim=2, optimizer=Sgd(learning_rate=0.5)).assign([5], np.ones((1, 2)))
        write_debugging_info(str(tmp_path), client, num_workers=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnavailableError, match=r"no .*debugging_info\.pb"):
        read_debugging_info(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\xff", "is damaged"),
        (
            DebuggingInfo(
                feature_name_configs=[DebuggingInfo.FeatureNameConfig(feature_name="f", config_str="}{")]
            ).SerializeToString(),
            "feature 'f' has no TableConfig",
        ),
    ],
)
def test_a_file_that_is_not_of_this_system_is_refused(tmp_path, content, message) -> None:
    (tmp_path / DEBUGGING_INFO).write_bytes(content)
    with pytest.raises(InvalidRequestError, match=message):
        read_debugging_info(str(tmp_path))
