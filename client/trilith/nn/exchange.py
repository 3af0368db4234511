"""What a module sends to the cluster: one lookup per forward, one push of gradients per backward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trilith.batches import TableInfo
from trilith.errors import InvalidRequestError
from trilith.pipelining import Lane, Pusher

__all__ = ["Exchange", "RowClient"]

log = logging.getLogger(__name__)

UInt64Array = npt.NDArray[np.uint64]
Float32Array = npt.NDArray[np.float32]
Updates = Mapping[str, tuple[UInt64Array, Float32Array]]


class RowClient(Protocol):
    """What embeddings need of `trilith.rows.Rows`; each call carries all tables."""

    @property
    def together(self) -> bool:
        """Whether the rows are in the workers, who make the same calls together."""

    @property
    def origin(self) -> object:
        """Equal for clients of the same rows."""

    def lookup(self, requests: Mapping[str, Any], /) -> Mapping[str, Float32Array]:
        """Per table float32[n, dim] rows, zeros where an id has none."""

    def begin_lookup(self, ids: Mapping[str, Any], /) -> Callable[[], dict[str, Float32Array]]:
        """Have the owners find rows; the call that is returned brings them."""

    @property
    def known_step(self) -> int:
        """The model's step as this client last heard it."""

    def hear_step(self, step: int, /) -> None:
        """Know that the model is at `step` at least."""

    def drain(self) -> None:
        """Wait until gradients that wait at their owners have been applied."""

    def table_info(self, name: str, /) -> TableInfo:
        """What is known of a table."""

    def apply_gradients(
        self,
        updates: Mapping[str, tuple[Any, Any]],
        /,
        *,
        advance: int = 0,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        """One optimizer step per distinct id, at the tables' rates times `rate_factors`.

        The model goes on by `advance` steps with it.
        """

    def assign_add(self, updates: Mapping[str, tuple[Any, Any]], /) -> None:
        """Add to rows, creating those that are missing."""


class Exchange:
    """Lookups and pushes of one module. Lookups may come from another thread than pushes.

    Args:
        client: The cluster.
        init_missing: A lookup answers zeros for an id that has no row yet; with this, a lookup of training creates such
            rows first, with their initial values, as a table that exists in full from the start would have them. Costs
            a call in steps that meet new ids. Lookups of evaluation create nothing.
        async_push: How many pushes may be on their way while training goes on; see `trilith.pipelining`.
        lane: Makes lookups that are made ahead, and pushes, in the order of the loop.
    """

    def __init__(
        self, client: RowClient, *, init_missing: bool = False, async_push: int = 0, lane: Lane | None = None
    ) -> None:
        self.client = client
        self.init_missing = init_missing
        self.lane = lane
        self.pusher = Pusher(async_push, lane=lane)
        self._holder: tuple[object, Callable[[Updates], None]] | None = None
        self._said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        """Another exchange with the same cluster; what is on its way or held back stays with this one."""
        return Exchange(self.client, init_missing=self.init_missing, async_push=self.pusher.depth)

    def __reduce__(self) -> Any:
        """The same for another process, where the client, unpickled, connects by itself."""
        return partial(Exchange, init_missing=self.init_missing, async_push=self.pusher.depth), (self.client,)

    def lookup(self, ids: Mapping[str, UInt64Array], *, create: bool = True) -> dict[str, Float32Array]:
        """Per table the float32[n, dim] rows of its ids, all tables in one call.

        Args:
            ids: By table.
            create: Whether this is a lookup of training, which with `init_missing` creates rows.
        """
        rows = dict(self.client.lookup(ids))
        if self.init_missing and create:
            self._create_missing(ids, rows)
        return rows

    def say_once(self, warning: str) -> None:
        """Log a warning the first time."""
        if warning not in self._said:
            self._said.add(warning)
            log.warning(warning)

    def begin(self, ids: Mapping[str, UInt64Array]) -> Callable[[], dict[str, Float32Array]]:
        """Have the owners find rows; the call that is returned lets them travel. For workers that hold the rows."""
        if not self.client.together or self.init_missing:
            raise InvalidRequestError(
                "only workers that hold the rows themselves have a queue between finding rows and their journey, and"
                " only without init_missing"
            )
        return self.client.begin_lookup(ids)

    def drain(self) -> None:
        """Wait until all gradients have been applied; raises what a push in the background ended with."""
        self.pusher.drain()
        self.client.drain()

    def _create_missing(self, ids: Mapping[str, UInt64Array], rows: dict[str, Float32Array]) -> None:
        missing = {}
        for table, found in rows.items():
            absent = ~found.any(axis=1)  # all zeros: no row yet, or one that is zero, which adding zero leaves alone
            if absent.any() or self.client.together:  # ranks create rows together or not at all
                missing[table] = absent
        if not missing:
            return
        # Adding zero creates the row and, unlike reinitialize, never undoes a step that another worker has just taken.
        new = {table: np.unique(ids[table][absent]) for table, absent in missing.items()}
        self.client.assign_add(
            {table: (some, np.zeros((some.size, rows[table].shape[1]), np.float32)) for table, some in new.items()}
        )
        again = self.client.lookup({table: ids[table][absent] for table, absent in missing.items()})
        for table, absent in missing.items():
            if not rows[table].flags.writeable:
                rows[table] = rows[table].copy()
            rows[table][absent] = again[table]

    def push(self, updates: Updates) -> None:
        """Apply gradients, all tables in one call; whoever holds them back gets them instead."""
        if self._holder is not None:
            self._holder[1](updates)
        else:
            self.send(updates)

    def send(
        self,
        updates: Updates,
        *,
        advance: int = 0,
        heard: int = 0,
        rate_factors: Mapping[str, float] | None = None,
        request_time: int | None = None,
    ) -> None:
        """Apply gradients, also while somebody holds them back.

        Args:
            updates: By table ids and gradients.
            advance: Steps of the model that they complete, which are counted with them.
            heard: Steps that another worker counts, and this client is to know of once its gradients are applied.
            rate_factors: By table what its rates are multiplied by.
            request_time: Unix seconds: when the rows were last updated; None: now.
        """
        options: dict[str, Any] = {"advance": advance} if advance else {}
        if rate_factors:
            options["rate_factors"] = rate_factors
        if request_time is not None and (updates or self.client.together):
            options["request_time"] = request_time
        # Who makes the same calls together makes this one with nothing to send, too.
        if updates or advance or heard or self.client.together:
            self.pusher.push(lambda: self._send(updates, options, heard))

    def _send(self, updates: Updates, options: Mapping[str, Any], heard: int) -> None:
        before = self.client.known_step if heard else 0
        if updates or options or self.client.together:
            self.client.apply_gradients(updates, **options)
        if heard:
            self.client.hear_step(before + heard)

    def hold_for(self, holder: object, take: Callable[[Updates], None]) -> None:
        """Give what is pushed to `take`, until `release`; one holder at a time."""
        if self._holder is not None:
            raise InvalidRequestError(
                f"gradients are being held back already, by {type(self._holder[0]).__name__}; close or leave it first"
            )
        self._holder = holder, take

    def release(self, holder: object) -> None:
        """Send what is pushed again, if it was `holder` who held it back."""
        if self._holder is not None and self._holder[0] is holder:
            self._holder = None

    @contextmanager
    def hold(self) -> Iterator[dict[str, list[tuple[UInt64Array, Float32Array]]]]:
        """Collect what is pushed inside, by table, instead of sending it."""
        held: dict[str, list[tuple[UInt64Array, Float32Array]]] = {}

        def take(updates: Updates) -> None:
            for table, update in updates.items():
                held.setdefault(table, []).append(update)

        self.hold_for(held, take)
        try:
            yield held
        finally:
            self.release(held)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Hold back what is pushed inside and send its sum as one step at the end; nothing is sent after an error."""
        with self.hold() as held:
            yield
        self.push(
            {
                table: (np.concatenate([ids for ids, _ in parts]), np.concatenate([grads for _, grads in parts]))
                for table, parts in held.items()
            }
        )
