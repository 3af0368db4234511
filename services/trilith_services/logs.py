"""Structured logs: one event per line on stderr, as key=value for people or as JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

__all__ = ["LogFormat", "setup_logging"]

LogFormat = Literal["text", "json"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup_logging(
    form: LogFormat = "text",
    *,
    level: str = "INFO",
    role: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> None:
    """Send every log record of this process to stderr.

    Args:
        form: "text" for `time level logger message key=value ...`, "json" for one object per line.
        level: Least level that is written.
        role: Fields on every line, such as {"ps": 0}.
        stream: Where to, instead of stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json(role or {}) if form == "json" else _Text(role or {}))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _Structured(logging.Formatter):
    """What both formats share: the fields that were given as `extra=`."""

    def __init__(self, role: Mapping[str, Any]) -> None:
        super().__init__()
        self._role = role

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        return {**self._role, **extra}

    def moment(self, record: logging.LogRecord) -> str:
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Text(_Structured):
    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {name}={_quoted(value)}" for name, value in self.fields(record).items())
        line = f"{self.moment(record)} {record.levelname} {record.name} {record.getMessage()}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(_Structured):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.moment(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self.fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(mark in text for mark in ' "=\n') else text
