"""SyncOptions: how often, how much at once and how patiently replicas are kept fresh."""

from __future__ import annotations

from dataclasses import dataclass

from trilith.errors import InvalidRequestError

__all__ = ["SyncOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """How replicas are kept fresh.

    Attributes:
        interval_s: Seconds from one look at what has changed to the next.
        dense_every_s: Seconds that a dense variable which changes all the time is not sent again.
        message_bytes: What a push is split at.
        timeout_s: Deadline of one push.
        heartbeat_s: Seconds after which a replica that lacks nothing is told so.
        noted_bytes: Memory for the ids that were touched in a table since the last look, and for those that wait for
            replicas that lag, 8 bytes each; where there are more, the table is copied whole, again and again if it
            must be.
        model_name: Put before "ps_<i>" in the pushes' model name.
        retry_first_s: Pause after a failed push; doubles, with jitter.
        retry_most_s: Longest pause.
    """

    interval_s: float = 1.0
    dense_every_s: float = 5.0
    message_bytes: int = 4 << 20
    timeout_s: float = 10.0
    heartbeat_s: float = 1.0
    noted_bytes: int = 64 << 20
    model_name: str = ""
    retry_first_s: float = 0.1
    retry_most_s: float = 2.0

    def __post_init__(self) -> None:
        if self.interval_s < 0.1:
            raise InvalidRequestError(f"interval_s={self.interval_s} is below 0.1")
        for name in ("dense_every_s", "timeout_s", "heartbeat_s", "retry_first_s", "retry_most_s"):
            if not getattr(self, name) > 0:
                raise InvalidRequestError(f"{name}={getattr(self, name)} is not above 0")
        if not 1 << 12 <= self.message_bytes <= 128 << 20:
            raise InvalidRequestError(f"message_bytes={self.message_bytes} is outside 4096..{128 << 20}")
        if self.noted_bytes < 8192:
            raise InvalidRequestError(f"noted_bytes={self.noted_bytes} is below 8192")

    @property
    def most_ids(self) -> int:
        """What fits into `noted_bytes`."""
        return self.noted_bytes // 8
