"""Makes every gRPC channel there is: one set of options, and no proxy unless somebody asks for one."""

from __future__ import annotations

import os

import grpc

from trilith.runtime.forks import renew_grpc

__all__ = ["PROXY_VARIABLE", "open_channel"]

PROXY_VARIABLE = "TRILITH_GRPC_PROXY"
"""Environment variable: 1 lets gRPC go by $grpc_proxy, $https_proxy or $http_proxy, but for what $no_proxy lists."""

KEEPALIVE_S = 10.0


def open_channel(
    address: str, *, max_message_bytes: int, keepalive_s: float = KEEPALIVE_S, own_connection: bool = False
) -> grpc.Channel:
    """A channel to one server, which connects with the first call.

    Proxies that the environment names are for the way out of a network: from one, 127.0.0.1 and the names of a cluster
    are not what they are here, and few let gRPC through.

    Args:
        address: host:port.
        max_message_bytes: Largest message sent or accepted.
        keepalive_s: How often a silent connection is probed, so that a vanished host is noticed.
        own_connection: Share none with other channels to the address: one that saw a refusal waits before it tries
            again.

    Raises:
        UnavailableError: This process was forked, and gRPC cannot begin anew in it; see `trilith.runtime.forks`.
    """
    renew_grpc()
    keepalive_ms = int(1000 * keepalive_s)
    options = [
        ("grpc.enable_http_proxy", int(os.environ.get(PROXY_VARIABLE) == "1")),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # gRPC's own retries would keep a copy of every message, and cannot know what is safe to repeat.
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms // 2),
        ("grpc.use_local_subchannel_pool", int(own_connection)),
    ]
    return grpc.insecure_channel(address, options=options)
