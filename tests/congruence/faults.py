"""Things that go wrong on purpose: shards that wait, fail or lose their answer, and connections that break."""

from __future__ import annotations

import contextlib
import socket
import threading


class Meddled:
    """A Store whose methods can be replaced; the rest passes through."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, attribute):
        return getattr(self._store, attribute)

    def until(self, deadline):
        """Itself, and not the store."""
        return self


class Blocking(Meddled):
    """Lookups wait until `release`; `entered` counts those that have begun."""

    def __init__(self, store):
        super().__init__(store)
        self.entered = threading.Semaphore(0)
        self.release = threading.Event()
        self.applied = 0

    def lookup_into(self, parts, outs):
        self.entered.release()
        self.release.wait(30)
        self._store.lookup_into(parts, outs)

    def apply_gradients(self, parts, write):
        self.applied += 1
        return self._store.apply_gradients(parts, write)


class Failing(Meddled):
    """Runs each write, then raises the next of `errors` instead of answering."""

    def __init__(self, store):
        super().__init__(store)
        self.errors = []
        self.calls = 0

    def _then_fail(self, verb, *arguments, **keywords):
        self.calls += 1
        answer = getattr(self._store, verb)(*arguments, **keywords)
        if self.errors:
            raise self.errors.pop(0)
        return answer

    def apply_gradients(self, parts, write):
        return self._then_fail("apply_gradients", parts, write)

    def assign_add(self, parts, write):
        self._then_fail("assign_add", parts, write)

    def global_step(self, *, advance=None, set_to=None, write=None):
        return self._then_fail("global_step", advance=advance, set_to=set_to, write=write)

    def apply_dense_gradients(self, parts, write, *, learning_rate=0.0):
        return self._then_fail("apply_dense_gradients", parts, write, learning_rate=learning_rate)


class LosingProxy:
    """A TCP relay that, once armed, breaks the connection instead of bringing the next answer."""

    def __init__(self, port):
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.lost = 0
        self._armed = threading.Event()
        self._sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_next_answer(self):
        self._armed.set()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                threading.Thread(target=self._relay, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._relay, args=(far, near, True), daemon=True).start()

    def _relay(self, source, target, answers):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self._armed.is_set() and _has_answer(data):
                    self._armed.clear()
                    self.lost += 1
                    break
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self):
        """End the relay and all its connections."""
        self._listener.close()
        for each in self._sockets:
            each.close()


def _has_answer(data):
    """Whether HTTP/2 frames carry headers or a message, not just settings, pings and windows."""
    while len(data) >= 9:
        if data[3] in (0, 1):
            return True
        data = data[9 + int.from_bytes(data[:3], "big") :]
    return False
