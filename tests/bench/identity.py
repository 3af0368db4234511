"""The reference of every RPC figure: a server that moves bytes and does nothing else, over gRPC and over plain TCP.

Run as `python -m tests.bench.identity` it prints its two ports as JSON and serves until its input ends. The gRPC method
takes any bytes and answers with as many as the request's first eight say; an empty request has an empty answer. The TCP
side expects the sizes of request and answer, eight bytes each, before every request.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.bench.processes import EXPERIMENTS, Child, python_module

os.environ.setdefault("GRPC_EXPERIMENTS", EXPERIMENTS)

import grpc

from trilith.ops.memory import tune_allocator

__all__ = ["Identity", "RawSocket", "identity_server"]

_METHOD = "/bench/Identity"
_OPTIONS = [("grpc.max_send_message_length", 256 << 20), ("grpc.max_receive_message_length", 256 << 20)]
_SIZES = struct.Struct("<qq")
_LENGTH = struct.Struct("<q")


class Identity:
    """The gRPC client side; thread-safe."""

    def __init__(self, port: int) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=_OPTIONS)
        self._call: Any = self._channel.unary_unary(_METHOD)

    def request(self, sent: int, received: int) -> bytes:
        """A request of `sent` bytes that asks for `received` bytes."""
        return (_LENGTH.pack(received) + os.urandom(sent))[:sent]

    def call(self, request: bytes) -> bytes:
        """One call."""
        answer: bytes = self._call(request, timeout=30.0)
        return answer

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


class RawSocket:
    """The TCP client side; one thread."""

    def __init__(self, port: int, sent: int, received: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head = _SIZES.pack(sent, received)
        self._payload = bytes(sent)
        self._answer = memoryview(bytearray(received))

    def call(self) -> None:
        """Send the request and take the answer."""
        self._connection.sendall(self._head)
        self._connection.sendall(self._payload)
        _receive(self._connection, self._answer)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@contextlib.contextmanager
def identity_server() -> Iterator[tuple[int, int]]:
    """Run the server in a process of its own; gives its ports, gRPC and TCP."""
    server = Child(python_module("tests.bench.identity"))
    try:
        ports = server.wait_for(event="serving")
        yield ports["grpc"], ports["tcp"]
    finally:
        server.stop()


def _receive(connection: socket.socket, into: memoryview) -> bool:
    """Fill `into`; False if the other side has closed."""
    at = 0
    while at < len(into):
        got = connection.recv_into(into[at:])
        if got == 0:
            return False
        at += got
    return True


def _serve_tcp(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer_tcp, args=(connection,), daemon=True).start()


def _answer_tcp(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = memoryview(bytearray(_SIZES.size))
    payload, answer = memoryview(bytearray(0)), b""
    with connection:
        while _receive(connection, head):
            sent, received = _SIZES.unpack(head)
            if len(payload) != sent:
                payload = memoryview(bytearray(sent))
            if len(answer) != received:
                answer = bytes(received)
            if not _receive(connection, payload):
                return
            connection.sendall(answer)


def main() -> int:
    """Serve until the input ends."""
    tune_allocator()
    answers: dict[int, bytes] = {}

    def identity(request: bytes, context: grpc.ServicerContext) -> bytes:
        del context
        size = _LENGTH.unpack_from(request)[0] if request else 0
        answer = answers.get(size)
        if answer is None:
            answer = answers[size] = os.urandom(size)
        return answer

    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Identity": grpc.unary_unary_rpc_method_handler(identity)
    }
    server = grpc.server(ThreadPoolExecutor(8), options=_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_tcp, args=(listener,), daemon=True).start()
    print(json.dumps({"event": "serving", "grpc": port, "tcp": listener.getsockname()[1]}), flush=True)
    sys.stdin.read()
    server.stop(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
