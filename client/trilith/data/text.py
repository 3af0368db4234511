"""Text in any encoding as a stream of UTF-8."""

from __future__ import annotations

import codecs

from trilith.data.streams import ByteStream
from trilith.errors import DataError, InvalidRequestError

__all__ = ["Utf8Stream", "check_encoding"]

_PIECE = 1 << 18
# Longer marks first: that of UTF-32 begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def check_encoding(encoding: str | None) -> None:
    """Refuse an encoding that Python does not know, or that is none of text."""
    try:
        if encoding is not None:
            "a".encode(encoding)
    except (LookupError, TypeError):
        raise InvalidRequestError(
            f"encoding={encoding!r} is no encoding that Python knows, such as 'latin-1'"
        ) from None


class Utf8Stream:
    """What a file of text holds, as UTF-8, for readers that want a file.

    Where it is damaged it ends, behind the last whole line.

    Args:
        stream: The bytes as they are.
        encoding: Of them; None is UTF-8 that is passed on unchecked, or what a mark at the beginning says.

    Attributes:
        damage: Why it ended too early, if it did.
    """

    def __init__(self, stream: ByteStream, encoding: str | None) -> None:
        self.closed = False
        self._stream = stream
        self._ready = b""
        self._ended = False
        self.damage: DataError | None = None
        self._taken = 0
        head = self._pull()
        while len(head) < 4 and (more := self._pull()):
            head += more
        for mark, name in _MARKS:
            same = encoding is None or codecs.lookup(encoding).name.startswith(name[:6])
            if head.startswith(mark) and same:
                head, encoding = head[len(mark) :], name
                break
        self._encoding = encoding or "utf-8"
        plain = codecs.lookup(self._encoding).name == "utf-8"
        self._decoder = None if plain else codecs.getincrementaldecoder(self._encoding)()
        self._ready = self._decoded(head)

    def _pull(self) -> bytes:
        """Some bytes as they are; none at the end."""
        part = bytearray(_PIECE)
        try:
            got = self._stream.readinto(memoryview(part))
        except DataError as error:
            self.damage, self._ended = error, True
            return b""
        self._taken += got
        self._ended = not got
        return bytes(part[:got])

    def _decoded(self, data: bytes) -> bytes:
        if self._decoder is None:
            return data
        try:
            return self._decoder.decode(data, final=self._ended and self.damage is None).encode()
        except UnicodeError as error:
            reason = getattr(error, "reason", error)
            self.damage = DataError(f"before byte {self._taken} there is what is no {self._encoding}: {reason}")
            self._ended = True
            if not isinstance(error, UnicodeDecodeError):
                return b""
            return error.object[: error.start].decode(self._encoding, errors="ignore").encode()

    def _fill(self) -> bool:
        """Have more ready, unless all was read."""
        while not self._ended:
            more = self._decoded(self._pull())
            if more:
                self._ready += more
                return True
        return False

    def peek(self) -> bytes:
        """What is ready; none only at the end."""
        if not self._ready:
            self._fill()
        return self._ready

    def _lines(self, size: int) -> int:
        """How much of what is ready, up to `size`, can be given out: whole lines, unless all is well up to the end."""
        while not self._ended and b"\n" not in self._ready and b"\r" not in self._ready:
            self._fill()
        if self._ended and self.damage is None:
            return min(size, len(self._ready))
        return min(size, max(self._ready.rfind(b"\n"), self._ready.rfind(b"\r")) + 1)

    def readline(self) -> bytes:
        """A line with its end, which is LF, CR LF or CR; none at the end."""
        at = 0
        while True:
            places = [place for each in (b"\n", b"\r") if (place := self._ready.find(each, at)) >= 0]
            if places and (min(places) + 1 < len(self._ready) or self._ended):
                stop = min(places) + 1
                if self._ready[stop - 1 : stop + 1] == b"\r\n":
                    stop += 1
                break
            at = min(places, default=len(self._ready))
            if not self._fill() and not places:
                stop = len(self._ready)
                break
        line, self._ready = self._ready[:stop], self._ready[stop:]
        return line

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; none only at the end."""
        while size < 0 and self._fill():
            pass
        stop = self._lines(len(self._ready) if size < 0 else size)
        data, self._ready = self._ready[:stop], self._ready[stop:]
        return data

    def close(self) -> None:
        """Be closed; the stream is its opener's."""
        self.closed = True
