"""Division of a pipeline among the workers of a DataLoader: together they give what one process alone would give.

Where a step treats each record by itself, workers divide the files. A step that depends on what came before it (the
first ten records, every third one, a remainder that is dropped) has to see everything: workers then run the steps up to
there alike and divide what comes out, by records, or by batches behind `batch`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trilith.data.pipeline.nodes import (
    Apply,
    Batch,
    Context,
    Node,
    Parse,
    Prefetch,
    Read,
    Share,
    Span,
    Topics,
    open_nodes,
)
from trilith.data.pipeline.sources import Merging
from trilith.data.pipeline.stages import Stage
from trilith.errors import InvalidRequestError

__all__ = ["Merge", "divides_itself", "open_divided"]

_ONE_BY_ONE = (Apply, Parse, Prefetch)
"""Steps behind `batch` that make one element of one, in order."""


@dataclass(frozen=True, slots=True)
class Merge(Node):
    """Records of several pipelines in turns."""

    pipelines: tuple[tuple[Node, ...], ...]
    block_length: int

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        return Merging([open_divided(each, context) for each in self.pipelines], self.block_length)


def open_divided(nodes: tuple[Node, ...], context: Context) -> Stage:
    """Make the stages of a pipeline for one of the context's workers; the last one.

    Raises:
        InvalidRequestError: The source hands records to whoever asks, and a step would have to see all of them.
    """
    index, count = context.worker
    whole = [place for place, node in enumerate(nodes) if node.whole]
    if count == 1 or not whole:
        return open_nodes(nodes, context)
    if divides_itself(nodes):
        # A remainder of what a process happened to get is its own to drop; other steps would drop what is others'.
        if steps := [str(nodes[place]) for place in whole if not isinstance(nodes[place], Batch)]:
            raise InvalidRequestError(
                f"{' and '.join(steps)} cannot be shared by {count} DataLoader workers where each is handed records of "
                "its own, by a queue or a topic: none of them sees all. Use num_workers=0 or 1, or leave the step out"
            )
        return open_nodes(nodes, context)
    alone = dataclasses.replace(context, worker=(0, 1))
    return open_nodes(_divided(nodes, whole[-1], index, count), alone)


def divides_itself(nodes: tuple[Node, ...]) -> bool:
    """Whether a pipeline's source hands each record to one of the processes that read it."""
    source = nodes[0]
    if isinstance(source, Merge):
        return any(divides_itself(each) for each in source.pipelines)
    if isinstance(source, Read):
        return source.deal is not None and source.shared is not False
    upstream = getattr(getattr(source, "splitter", None), "nodes", None)
    return isinstance(source, Topics) if upstream is None else divides_itself(upstream)


def _divided(nodes: tuple[Node, ...], last: int, index: int, count: int) -> tuple[Node, ...]:
    """The pipeline with a share taken where it costs least, at the latest behind its step `last`, which needs all."""
    batch = next((place for place, node in enumerate(nodes[: last + 1]) if isinstance(node, Batch)), None)
    if batch is None:
        return (*nodes[: last + 1], Share(index, count, records=True), *nodes[last + 1 :])
    between = nodes[batch + 1 : last + 1]
    if all(isinstance(node, (*_ONE_BY_ONE, Span)) for node in between):
        # The share is taken before batches are parsed, and spans of all batches become spans of its own.
        share = Share(index, count, records=False)
        return (*nodes[: batch + 1], share, *_spans(between, index, count), *nodes[last + 1 :])
    return (*nodes[: last + 1], Share(index, count, records=False), *nodes[last + 1 :])


def _spans(nodes: tuple[Node, ...], first: int, count: int) -> Iterator[Node]:
    """Steps for every `count`-th element, from the `first`-th on, that are written for all elements."""
    for node in nodes:
        if not isinstance(node, Span):
            yield node
        elif node.limit is None:
            yield Span(_below(node.skipped, first, count), None, records=False)
            first = (first - node.skipped) % count
        else:
            yield Span(0, _below(node.limit, first, count), records=False)


def _below(bound: int, first: int, count: int) -> int:
    """How many of `first`, `first` + `count`, ... are below a bound."""
    return max(0, -(-(bound - first) // count))
