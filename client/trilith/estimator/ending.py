"""The end of PS that are a run's own: when all is trained and saved, and all workers have let go of them."""

from __future__ import annotations

import logging
from typing import Any

from trilith.errors import InvalidRequestError, TrilithError
from trilith.estimator.group import Ranks

__all__ = ["check_owned", "shut_down"]

log = logging.getLogger(__name__)


def check_owned(client: Any) -> None:
    """Refuse to train on PS that could not be shut down afterwards.

    Raises:
        InvalidRequestError: One of them was not started as a run's own.
    """
    others = [answer.shard_index for answer in client.describe() if not answer.owned]
    if others:
        raise InvalidRequestError(
            f"shut_down_ps: PS {', '.join(map(str, others))} let no client shut them down; start them with "
            "`trilith ps --owned`, if nobody else is to use them, or leave shut_down_ps out"
        )


def shut_down(client: Any, ranks: Ranks, *, chief: bool) -> None:
    """Have the PS end, once all workers in step are here; by the chief. A PS that is gone already is fine."""
    try:
        ranks.any(False)
        if chief and (gone := client.shutdown()):
            log.warning("PS %s did not answer when all were shut down", ", ".join(map(str, gone)))
    except (TrilithError, RuntimeError) as error:  # the run is done and saved: it does not fail for this
        log.warning("the PS are not shut down: %s", error)
