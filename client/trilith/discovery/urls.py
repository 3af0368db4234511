"""From a URL to the Directory it stands for."""

from __future__ import annotations

from trilith.discovery import Directory
from trilith.discovery.zk_url import redact
from trilith.errors import InvalidRequestError

__all__ = ["CLUSTER_FORMS", "FORMS", "open_directory"]

CLUSTER_FORMS = "static://host:port,host:port,… with shard 0 first, or zk://host:2181,…/path"
"""What to write for a cluster; the README has the other forms."""

FORMS = {
    "static": "static://host:port,host:port",
    "zk": "zk://[user:password@]host:2181,host:2181/path",
    "tf-config": "tf-config://",
    "mlp": "mlp://",
    "hosts": "hosts:///directory",
}
"""What a URL of each scheme looks like."""


def open_directory(url: str, *, timeout_s: float = 30.0) -> Directory:
    """Open the directory that a URL stands for.

    Args:
        url: static://host:port,… lists the PS; zk://host,…/path is ZooKeeper; tf-config:// reads $TF_CONFIG; mlp://
            reads MLP_* and OMPI_*; hosts:///directory is a directory of files.
        timeout_s: How long to wait for ZooKeeper.

    Raises:
        InvalidRequestError: It is no such URL; the message shows no credentials.
        UnavailableError: ZooKeeper cannot be reached.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in FORMS:
        raise InvalidRequestError(f"{redact(url)!r} is no directory of a cluster; write {' or '.join(FORMS.values())}")
    if scheme == "static":
        from trilith.discovery.static import StaticDirectory

        return StaticDirectory.parse(rest)
    if scheme == "zk":
        from trilith.discovery.zk_directory import ZooKeeperDirectory

        return ZooKeeperDirectory(url, timeout_s=timeout_s)
    if scheme == "hosts":
        from trilith.discovery.host_files import HostFilesDirectory

        if not rest.startswith("/"):
            raise InvalidRequestError(f"{url!r} names no absolute directory; write {FORMS['hosts']}")
        return HostFilesDirectory(rest)
    if rest:
        raise InvalidRequestError(f"{url!r}: {scheme}:// takes nothing after it; it reads the environment")
    if scheme == "tf-config":
        from trilith.discovery.tf_config import TfConfigDirectory

        return TfConfigDirectory.from_environment()
    from trilith.discovery.mlp import MlpDirectory

    return MlpDirectory(wait_s=0.0)  # who connects waits for a PS by itself
