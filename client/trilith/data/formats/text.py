"""Text in any encoding as a stream of UTF-8."""

from __future__ import annotations

import codecs
import re

from trilith.data.formats.streams import ByteStream
from trilith.errors import DataError, InvalidRequestError

__all__ = ["Utf8Stream", "check_encoding", "is_odd", "restored"]

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


# Bytes that are no text go through what reads UTF-8 as characters that nobody uses, U+F700 to U+F7FF.
_FIRST_ODD = 0xF700
_ODD = re.compile(rb"\xef[\x9c-\x9f][\x80-\xbf]")
_HANDLER = "trilith-odd-bytes"


def _as_odd(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(_FIRST_ODD + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(_HANDLER, _as_odd)


def is_odd(text: bytes) -> bool:
    """Whether text of a `Utf8Stream` that met odd bytes has some."""
    return _ODD.search(text) is not None


def restored(text: bytes) -> bytes:
    """Text of a `Utf8Stream` with its odd bytes as they were."""
    return _ODD.sub(lambda found: bytes([ord(found.group().decode()) - _FIRST_ODD]), text)


class Utf8Stream:
    """What a file of text holds, as UTF-8, for readers that want a file.

    Where its stream is damaged it ends, behind the last whole line. What is no text in its encoding is still there: see
    `restored`.

    Args:
        stream: The bytes as they are.
        encoding: Of them; None is UTF-8, or what a mark at the beginning says.

    Attributes:
        encoding: As found out.
        odd: Whether some bytes are no text in this encoding, so far.
        damage: Why it ended too early, if it did.
    """

    def __init__(self, stream: ByteStream, encoding: str | None) -> None:
        self.closed = False
        self._stream = stream
        self._ready = bytearray()
        self._ended = False
        self.odd = False
        self.damage: DataError | None = None
        head = self._pull()
        while len(head) < 4 and (more := self._pull()):
            head += more
        for mark, name in _MARKS:
            same = encoding is None or codecs.lookup(encoding).name.startswith(name[:6])
            if head.startswith(mark) and same:
                head, encoding = head[len(mark) :], name
                break
        self.encoding = encoding or "utf-8"
        self._plain = codecs.lookup(self.encoding).name == "utf-8"
        self._decoder = codecs.getincrementaldecoder(self.encoding)(errors=_HANDLER)
        self._ready += self._decoded(head)

    def _pull(self) -> bytearray:
        """Some bytes as they are; none at the end."""
        part = bytearray(_PIECE)
        try:
            got = self._stream.readinto(memoryview(part))
        except DataError as error:
            self.damage, self._ended = error, True
            return bytearray()
        self._ended = not got
        del part[got:]
        return part

    def _decoded(self, data: bytearray) -> bytes | bytearray:
        if self._plain and data.isascii() and not self._decoder.getstate()[0]:
            return data
        try:
            text = self._decoder.decode(bytes(data), final=self._ended and self.damage is None).encode()
        except UnicodeError as error:  # an encoding that cannot go on behind an error
            self.damage, self._ended = DataError(f"there is what is no {self.encoding}: {error}"), True
            return b""
        self.odd = self.odd or is_odd(text)
        return text

    def _fill(self) -> bool:
        """Have more ready, unless all was read."""
        while not self._ended:
            more = self._decoded(self._pull())
            if more:
                self._ready += more
                return True
        return False

    def more(self) -> bool:
        """Whether this is not the end."""
        return bool(self._ready) or self._fill()

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
        return bytes(self._taken(stop))

    def read(self, size: int = -1) -> bytearray:
        """Up to `size` bytes; none only at the end."""
        while (size < 0 or len(self._ready) < size) and self._fill():
            pass
        return self._taken(self._lines(len(self._ready) if size < 0 else size))

    def _taken(self, size: int) -> bytearray:
        taken, self._ready = self._ready, self._ready[size:]
        del taken[size:]
        return taken

    def close(self) -> None:
        """Be closed; the stream is its opener's."""
        self.closed = True
