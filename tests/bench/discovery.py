"""Discovery: how long a PS that was killed and started again is missing from its clients' view of the cluster."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import trilith
from tests import zookeeper
from tests.bench.harness import Benchmark, Context, Entry, lower
from tests.bench.processes import Child, trilith_process
from trilith.checkpoint import checkpoint_name
from trilith.discovery import PS
from trilith.discovery.zk_url import ZkUrl
from trilith.tables import Adagrad

__all__ = ["BENCHMARKS"]

_MORE_S = 3.0
"""What a restart may take beyond the session's timeout."""
_PATIENCE_S = 120.0


def back(context: Context) -> list[Entry]:
    """One PS with a checkpoint; each time it comes back on another port, and a client goes on with its rows."""
    if why := zookeeper.missing():
        raise RuntimeError(why)
    seen, served = [], []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(zookeeper.server(scratch / "zookeeper"))
        url = f"zk://{server.host}/bench"
        checkpoints = str(scratch / "checkpoints")

        def start() -> str:
            process = trilith_process("ps", "--discovery", url, "--checkpoint-dir", checkpoints)
            stack.callback(process.stop)
            killable.append(process)
            return f":{process.wait_for(message='listening')['port']}"

        killable: list[Child] = []  # the last of them is the PS
        start()
        client = stack.enter_context(trilith.connect(url, timeout_s=_PATIENCE_S))
        directory = client.directory
        assert directory is not None
        ids = np.arange(1000, dtype=np.uint64)
        users = client.table("user", dim=16, optimizer=Adagrad(learning_rate=0.1))
        users.apply_gradients(ids, np.ones((ids.size, 16), np.float32))
        client.save(f"{checkpoints}/{checkpoint_name(1)}")
        rows = users.lookup(ids)
        for turn in range(context.sizes.discovery_kills):
            context.progress("killing", turn, context.sizes.discovery_kills)
            killable[-1].process.kill()
            killed = time.monotonic()
            port = start()
            _until(lambda: directory.query(PS).get(0, "").endswith(port))  # noqa: B023
            seen.append(time.monotonic() - killed)
            _until(lambda: client.rejoin() or np.array_equal(users.lookup(ids), rows))
            served.append(time.monotonic() - killed)
            assert np.array_equal(users.lookup(ids), rows)
    context.note(f"discovery.back: {np.median(served):.2f} s after the kill the client reads the restored rows")
    bound = ZkUrl.parse(url).session_timeout_s + _MORE_S
    return [lower("discovery.back", float(np.median(seen)), bound, "s", 1.0)]


def _until(condition: Callable[[], object]) -> None:
    zookeeper.eventually(condition, timeout_s=_PATIENCE_S)


BENCHMARKS = (Benchmark(("discovery.back",), back),)
