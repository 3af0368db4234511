"""Matching: which of a checkpoint's dense parameters and buffers a model begins with, by name, alias or likeness."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from trilith.errors import CheckpointError, InvalidRequestError

__all__ = ["How", "Matched", "Piece", "match"]

How: TypeAlias = Literal["exact", "auto", "present"]
Shape: TypeAlias = tuple[int, ...]

_WRAPPERS = {"module", "_orig_mod"}  # names that DistributedDataParallel and torch.compile put before others


class Piece(NamedTuple):
    """Rows of a tensor of a checkpoint, along axis 0.

    Attributes:
        name: Of the tensor.
        start: The first row.
        stop: The one behind the last; None: the tensor is taken whole.
    """

    name: str
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        return self.name if self.stop is None else f"{self.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True, slots=True)
class Matched:
    """What a model takes from a checkpoint.

    Attributes:
        sources: By name in the model, the pieces that it is put together of along axis 0.
        missing: Names in the model that begin as they were made.
        left: Names in the checkpoint that are not taken.
    """

    sources: Mapping[str, tuple[Piece, ...]]
    missing: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def renamed(self) -> dict[str, str]:
        """What comes from another name, or from parts of some, by name in the model."""
        shown = {name: " + ".join(map(str, pieces)) for name, pieces in self.sources.items()}
        return {name: text for name, text in shown.items() if text != name}


def match(
    path: str,
    mine: Mapping[str, Shape],
    theirs: Mapping[str, Shape],
    *,
    aliases: Mapping[str, str | tuple[str, ...]],
    how: How,
) -> Matched:
    """Find what a model takes from a checkpoint.

    Args:
        path: Of the checkpoint, for messages.
        mine: Shapes of the model's parameters and buffers, in its order.
        theirs: Those of the checkpoint.
        aliases: Name in the checkpoint by name in the model, or several whose tensors are joined along axis 0. Several
            names with one alias share it: each gets all of it where it has its shape, else it is cut along axis 0.
        how: What is done about names without an alias. exact: all must be there, and no others. auto: layers that were
            renamed are looked for, and all must be found. present: what is there by name and shape is taken.

    Raises:
        InvalidRequestError: The model has no such name as one of `aliases`.
        CheckpointError: The checkpoint lacks something, or it has another shape.
    """
    sources = dict(_aliased(path, mine, theirs, aliases))
    used = {piece.name for pieces in sources.values() for piece in pieces}
    rest = {name: shape for name, shape in mine.items() if name not in sources}
    others = {name: shape for name, shape in theirs.items() if name not in used}
    if how == "auto" and any(theirs.get(name) != shape for name, shape in rest.items()):
        found = _alike(rest, others)
    else:
        found = {name: name for name, shape in rest.items() if theirs.get(name) == shape}
    sources |= {name: (Piece(old),) for name, old in found.items()}
    used |= set(found.values())
    missing = tuple(name for name in mine if name not in sources)
    left = tuple(name for name in sorted(theirs) if name not in used)
    if how == "present" or not (missing or (left and how == "exact")):
        return Matched({name: sources[name] for name in mine if name in sources}, missing, left)
    raise CheckpointError(_refusal(path, mine, theirs, missing, left, how))


def _refusal(
    path: str,
    mine: Mapping[str, Shape],
    theirs: Mapping[str, Shape],
    missing: Iterable[str],
    left: Iterable[str],
    how: How,
) -> str:
    shapes = {name: f"{list(theirs[name])}, here {list(mine[name])}" for name in missing if name in theirs}
    lacks, beside = [name for name in missing if name not in theirs], [name for name in left if name not in shapes]
    auto = "" if how == "auto" else " warm_start_match=auto looks for layers that were renamed,"
    return (
        f"{path} is of another model: it lacks {lacks}, has {beside} beside, and other shapes of {shapes}; "
        f"warm_start_aliases says which is which,{auto} warm_start_match=present takes what is there by name and "
        "shape, and warm_start_parts=rows the rows alone"
    )


# ---- aliases ---------------------------------------------------------------------------------------------------------


def _aliased(
    path: str, mine: Mapping[str, Shape], theirs: Mapping[str, Shape], aliases: Mapping[str, str | tuple[str, ...]]
) -> Iterable[tuple[str, tuple[Piece, ...]]]:
    for name in aliases:
        if name not in mine:
            near = difflib.get_close_matches(name, mine, n=1)
            raise InvalidRequestError(
                f"warm_start_aliases: the model has no {name!r}; "
                + (f"do you mean {near[0]!r}?" if near else f"it has {list(mine)}")
            )
    sharing: dict[str, list[str]] = {}
    for name in mine:  # whose order is that of the pieces
        old = aliases.get(name, ())
        for each in (old,) if isinstance(old, str) else old:
            if each not in theirs:
                near = difflib.get_close_matches(each, theirs, n=1)
                raise CheckpointError(
                    f"warm_start_aliases: {path} has no {each!r}; "
                    + (f"do you mean {near[0]!r}?" if near else f"it has {sorted(theirs)}")
                )
        if isinstance(old, str):
            sharing.setdefault(old, []).append(name)
        elif old:
            _check_rows(path, {name: mine[name]}, {each: theirs[each] for each in old})
            yield name, tuple(map(Piece, old))
    for old, names in sharing.items():
        if all(mine[name] == theirs[old] for name in names):
            yield from ((name, (Piece(old),)) for name in names)
            continue
        _check_rows(path, {name: mine[name] for name in names}, {old: theirs[old]})
        start = 0
        for name in names:
            yield name, (Piece(old, start, start + mine[name][0]),)
            start += mine[name][0]


def _check_rows(path: str, mine: Mapping[str, Shape], theirs: Mapping[str, Shape]) -> None:
    """Refuse what is not the same rows, one below the other."""
    here, there = list(mine.values()), list(theirs.values())
    fits = all(here + there) and len({shape[1:] for shape in here + there}) == 1
    if len(here) == len(there) == 1 or not fits or sum(s[0] for s in here) != sum(s[0] for s in there):
        shapes = [", ".join(f"{name!r} {list(shape)}" for name, shape in each.items()) for each in (mine, theirs)]
        raise CheckpointError(
            f"warm_start_aliases: {shapes[0]} cannot be made of {shapes[1]} of {path}: the shapes differ, also when "
            "tensors are cut or joined along axis 0"
        )


# ---- layers that were renamed ----------------------------------------------------------------------------------------

_Layer: TypeAlias = dict[str, Shape]


def _alike(mine: Mapping[str, Shape], theirs: Mapping[str, Shape]) -> dict[str, str]:
    """Names in the checkpoint by names in the model, where whole layers are alike.

    Layers whose names differ by numbers alone go by their order, if there are as many and their shapes agree. Of the
    others, one goes with that whose name ends most like its own, if it is the only one and that holds the other way
    round too. Names that no layer's likeness decides go by themselves.
    """
    here, there = _layers(mine), _layers(theirs)
    pairs: dict[str, str] = {}
    old_of = _by_stem(there)
    for stem, names in _by_stem(here).items():
        old = old_of.get(stem, [])
        if all(_fits(here[name], there.get(name)) for name in names):
            pairs |= {name: name for name in names}
        elif len(names) == len(old) and all(_fits(here[a], there[b]) for a, b in zip(names, old, strict=True)):
            pairs |= dict(zip(names, old, strict=True))
        else:
            pairs |= {name: name for name in names if _fits(here[name], there.get(name))}
    free = [name for name in there if name not in set(pairs.values())]
    lost = [name for name in here if name not in pairs]
    closest = {name: _closest(name, [each for each in free if _fits(here[name], there[each])]) for name in lost}
    for name, each in closest.items():
        if each and _closest(each, [other for other in lost if _fits(here[other], there[each])]) == name:
            pairs[name] = each
    found = {f"{a}.{kind}" if a else kind: f"{b}.{kind}" if b else kind for a, b in pairs.items() for kind in here[a]}
    taken = set(found.values())
    same = {name: name for name in mine if name not in found and name not in taken and theirs.get(name) == mine[name]}
    return found | same


def _layers(shapes: Mapping[str, Shape]) -> dict[str, _Layer]:
    """Shapes by what they are in a layer, by layer."""
    layers: dict[str, _Layer] = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        layers.setdefault(layer, {})[kind] = shape
    return layers


def _fits(mine: _Layer, theirs: _Layer | None) -> bool:
    return theirs is not None and all(theirs.get(kind) == shape for kind, shape in mine.items())


def _by_stem(layers: Iterable[str]) -> dict[tuple[str, ...], list[str]]:
    """Layers by their names without numbers, in the order of these."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in layers:
        groups.setdefault(tuple(re.sub(r"_?\d+$", "", part) for part in _parts(name)), []).append(name)
    return {stem: sorted(names, key=_numbers) for stem, names in groups.items()}


def _numbers(layer: str) -> list[int]:
    return [int(found[0]) if (found := re.search(r"\d+$", part)) else -1 for part in _parts(layer)]


def _parts(layer: str) -> list[str]:
    """Components of a layer's name without those of wrappers, and of several alike in a row one."""
    parts = [part for part in layer.split(".") if part not in _WRAPPERS]
    return [part for n, part in enumerate(parts) if part.isdigit() or n == 0 or part != parts[n - 1]]


def _closest(layer: str, others: Iterable[str]) -> str:
    """The one of others whose name ends most like a layer's; empty where none or several do."""
    scored = sorted(((_common_end(layer, other), other) for other in others), reverse=True)
    if not scored or not scored[0][0] or (len(scored) > 1 and scored[1][0] == scored[0][0]):
        return ""
    return scored[0][1]


def _common_end(one: str, other: str) -> int:
    """How many components two names have in common at their ends; numbers alone do not count, but as whole names."""
    a, b = _parts(one), _parts(other)
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    whole = count in (len(a), len(b))
    return count if whole or any(not part.isdigit() for part in a[len(a) - count :]) else 0
