"""`debugging_info.pb` of a model's directory: where its cluster is, and which table each feature has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf import text_format
from google.protobuf.message import DecodeError

from trilith.errors import InvalidRequestError, UnavailableError
from trilith.folder import Folder
from trilith_proto import ps_pb2
from trilith_proto.debugging_info_pb2 import DebuggingInfo

if TYPE_CHECKING:
    from trilith.rows import Rows

__all__ = ["DEBUGGING_INFO", "Debugged", "read_debugging_info", "write_debugging_info"]

DEBUGGING_INFO = "debugging_info.pb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Debugged:
    """A cluster, as its chief described it when it began to train.

    Attributes:
        cluster: Its address, as `trilith.connect` takes it.
        features: Name of its table by feature.
    """

    cluster: str
    features: dict[str, str]


def write_debugging_info(
    model_dir: str, client: Rows, *, num_workers: int, chief: str = "", features: Mapping[str, str] | None = None
) -> None:
    """Describe the cluster that `client` trains on; an embedded one, which nobody else can reach, is left out.

    Args:
        model_dir: Directory or URL.
        client: Of the cluster.
        num_workers: How many train.
        chief: host:port where they meet, if they do.
        features: Name of its table by feature; None: the features that were recorded through the client.
    """
    if not client.addresses:
        return
    tables = {config.name: config for config in client.describe()[0].tables}
    info = DebuggingInfo(num_workers=num_workers)
    info.cluster.chief_addr = chief
    info.cluster.ps_addrs.extend(client.addresses)
    for feature, table in sorted((client.features if features is None else features).items()):
        text = text_format.MessageToString(tables[table], as_one_line=True)
        info.feature_name_configs.add(feature_name=feature, config_str=text)
    Folder(model_dir).write(DEBUGGING_INFO, info.SerializeToString(deterministic=True))


def read_debugging_info(model_dir: str) -> Debugged:
    """Read what the chief wrote.

    Raises:
        UnavailableError: It has not written anything yet.
        InvalidRequestError: The file is damaged.
    """
    folder = Folder(model_dir)
    try:
        info = DebuggingInfo.FromString(folder.read(DEBUGGING_INFO))
    except FileNotFoundError:
        path = folder.path(DEBUGGING_INFO)
        raise UnavailableError(f"there is no {path}: no cluster has begun to train with this directory") from None
    except DecodeError:
        raise InvalidRequestError(f"{folder.path(DEBUGGING_INFO)} is damaged") from None
    features = {}
    for each in info.feature_name_configs:
        try:
            features[each.feature_name] = text_format.Parse(each.config_str, ps_pb2.TableConfig()).name
        except text_format.ParseError as error:
            raise InvalidRequestError(
                f"{folder.path(DEBUGGING_INFO)}: feature {each.feature_name!r} has no TableConfig: {error}"
            ) from None
    return Debugged(cluster=f"static://{','.join(info.cluster.ps_addrs)}", features=features)
