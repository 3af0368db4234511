"""Dense reload: which of a checkpoint's dense variables those of a model are, by the reference's rules for names.

Names are as TensorFlow's: components with slashes between them, layers as `dense_2`, their parts `kernel` and `bias`,
partitions of one variable `part_0`, `part_1`. A run of the Estimator begins so with `RunConfig.warm_start_aliases` and
`warm_start_match`, whose rules are for torch's names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trilith.errors import CheckpointError, InvalidRequestError

__all__ = [
    "GUESSES",
    "AliasMap",
    "Guesses",
    "Reorder",
    "alias_map",
    "extended_names",
    "fill",
    "full_prefix",
    "infer_variable_names",
    "merge_partitions",
    "new_name",
    "node_name",
    "reorder_info",
    "split_name",
]

Array = npt.NDArray[Any]

_DENSE = re.compile(r"(?:(?P<prefix>.*)/)?(?P<layer>\w+)/(?P<kind>bias|kernel|trainable_kernel_norm)(?P<suffix>.*)")
_PARTITION = re.compile(r".+/part_(\d+)(?:/.*)?")


# ---- names -----------------------------------------------------------------------------------------------------------


def node_name(name: str) -> str:
    """A name without blanks around it, slashes at its end, a caret before it and an output such as ":0" behind it."""
    return re.sub(r":\d+$", "", name.strip().rstrip("/").removeprefix("^"))


def new_name(name: str) -> str:
    """The `node_name` with each component where it occurs first alone: u/v/u/w is u/v/w."""
    return "/".join(dict.fromkeys(node_name(name).split("/")))


def infer_variable_names(names: Iterable[str]) -> set[str]:
    """The variables that names of partitions belong to; an output such as ":0" stays."""
    return {_whole(name) for name in names}


def _whole(name: str) -> str:
    return re.sub(r"/part_\d+(?=[/:]|$)", "", name)


def split_name(name: str) -> tuple[str, int]:
    """A name as text and the number at its end, 0 where there is none; the first character is always text."""
    digits = re.search(r"\d*$", name[1:])
    assert digits is not None  # which may be empty
    number = digits.group()
    return (name[: len(name) - len(number)], int(number)) if number else (name, 0)


class Reorder(NamedTuple):
    """Whether layers are numbered anew, from 0, and what stands before the number."""

    needed: bool
    base: str


def reorder_info(names: Iterable[str], *, sort: bool = False) -> Reorder:
    """How layers are numbered anew; one alone, of number 0 or 1, keeps its name.

    Args:
        names: Of layers; the text of the last is the base.
        sort: Order them by number first.

    Raises:
        InvalidRequestError: There are none.
    """
    ordered = sorted(names, key=lambda name: split_name(name)[1]) if sort else list(names)
    if not ordered:
        raise InvalidRequestError("no layers to number; give at least one name")
    text, number = split_name(ordered[-1])
    return Reorder(not (len(ordered) == 1 and number in (0, 1)), "dense_" if text == "dense" else text)


def full_prefix(prefix: str, known: Collection[str]) -> str:
    """The longest of the known prefixes that ends with this one; itself where none does."""
    return max((each for each in known if each.endswith(prefix)), key=lambda each: (len(each), each), default=prefix)


class Guesses:
    """What a name was before layers were renamed: the first rule that matches it from its start.

    Args:
        rules: Format strings by regular expression: {0} stands for the first group. The rest of a name is kept.
    """

    def __init__(self, rules: Mapping[str, str]) -> None:
        self._rules: dict[re.Pattern[str], str] = {}
        self.add(rules)

    def add(self, rules: Mapping[str, str]) -> None:
        """Put rules before those that there are.

        Raises:
            InvalidRequestError: One is no regular expression.
        """
        try:
            self._rules = {re.compile(pattern): text for pattern, text in rules.items()} | self._rules
        except re.error as error:
            raise InvalidRequestError(f"{error.pattern!r} is no regular expression: {error}") from None

    def __call__(self, name: str) -> str:
        """The guess; the name itself where no rule matches."""
        for pattern, text in self._rules.items():
            if found := pattern.match(name):
                return text.format(*found.groups()) + name[found.end() :]
        return name


GUESSES = Guesses(
    {
        r"c_dot/mlp": "c_dot/compress_tower",
        r"dcn/kernel_(\d+)/trainable_norm": "kernel_{0}_trainable_norm",
        r"dcn/kernel_(\d+)": "kernel_{0}",
        r"dcn/bias_(\d+)/trainable_norm": "bias_{0}_trainable_norm",
        r"dcn/bias_(\d+)": "bias_{0}",
    }
)
"""The reference's rules, of the process; `add` extends them."""


# ---- the automatic alias map -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AliasMap:
    """Which variables of a checkpoint those of a model are.

    Attributes:
        aliases: Name in the checkpoint by name in the model, partitions one by one; empty where nothing is to be
            renamed, or where not all were found.
        missing: Names of the model that nothing was found for.
    """

    aliases: Mapping[str, str]
    missing: tuple[str, ...] = ()

    @property
    def needed(self) -> bool:
        """Whether some variable has another name in the checkpoint."""
        old = set(self.aliases.values())
        return any(_whole(node_name(name)) not in old for name in self.aliases)


class _Part(NamedTuple):
    """A variable of a dense layer: `prefix/layer/kind` and what is behind."""

    prefix: str
    layer: str
    kind: str
    suffix: str

    @classmethod
    def of(cls, name: str) -> _Part | None:
        found = _DENSE.fullmatch(name)
        return None if found is None else cls(found["prefix"] or "", found["layer"], found["kind"], found["suffix"])

    def __str__(self) -> str:
        return f"{self.prefix}/{self.layer}/{self.kind}{self.suffix}".removeprefix("/")

    @property
    def stem(self) -> str:
        """Of the layer's name: dense for dense and for dense_2."""
        return split_name(self.layer)[0].rstrip("_")


def alias_map(current: Iterable[str], checkpoint: Iterable[str], *, guess: Guesses = GUESSES) -> AliasMap:
    """The automatic alias map: what the variables of a model were called when a checkpoint was written.

    Where the reference pairs the bias of one layer with the kernel of another, or cannot number partitions and layers
    without a number, here a layer goes as a whole, and those are numbered as all are.

    Args:
        current: The model's variables; partitions may have names of their own.
        checkpoint: Those of the checkpoint, whole ones.
        guess: What layers were called before.
    """
    there = {node_name(name) for name in checkpoint}
    clean = {name: _whole(node_name(name)) for name in current}
    if there.issuperset(clean.values()):
        return AliasMap({})
    known = extended_names(there)
    kept = _kept(set(clean.values()), there)
    found = {name: name if name in kept else known.get(name) for name in dict.fromkeys(clean.values())}
    numbered = _numbered([name for name, old in found.items() if old is None])
    for name in [name for name, old in found.items() if old is None]:
        guessed = guess(name)
        found[name] = known.get(guessed if guessed != name else numbered.get(name, name))
    missing = tuple(name for name, each in clean.items() if found[each] is None)
    if missing:
        return AliasMap({}, missing)
    aliases = {name: old for name, each in clean.items() if (old := found[each]) is not None}
    return AliasMap(aliases) if AliasMap(aliases).needed else AliasMap({})


def extended_names(checkpoint: Iterable[str]) -> dict[str, str]:
    """The names of a checkpoint by all that they may be called now: layers under their full prefix, numbered from 0."""
    known = {new_name(name): name for name in sorted(checkpoint)}
    parts = {name: part for name in known if (part := _Part.of(name)) is not None}
    prefixes: dict[str, set[str]] = {}
    for part in parts.values():
        if part.kind == "bias":
            prefixes.setdefault(part.layer, set()).add(part.prefix)
    full = {
        name: part._replace(prefix=full_prefix(part.prefix, prefixes.get(part.layer, ())))
        for name, part in parts.items()
    }
    layers: dict[tuple[str, str], set[str]] = {}
    for part in full.values():
        layers.setdefault((part.prefix, part.stem), set()).add(part.layer)
    renamed: dict[tuple[str, str], str] = {}
    for (prefix, _), names in layers.items():
        ordered = sorted(names, key=lambda name: (split_name(name)[1], name))
        needed, base = reorder_info(ordered)
        renamed |= {(prefix, name): f"{base}{k}" if needed else name for k, name in enumerate(ordered)}
    added = {str(part._replace(layer=renamed[part.prefix, part.layer])): known[name] for name, part in full.items()}
    under_full = {str(part): known[name] for name, part in full.items()}
    return {**under_full, **known, **added}


def _kept(current: set[str], there: set[str]) -> set[str]:
    """Those in the checkpoint, but for layers some of whose neighbours of the same name are not: they have moved."""
    groups: dict[tuple[str, ...], set[str]] = {}
    for name in current:
        part = _Part.of(name)
        groups.setdefault((name,) if part is None else (part.prefix, part.stem), set()).add(name)
    return {name for names in groups.values() if names <= there for name in names}


def _numbered(names: Iterable[str]) -> dict[str, str]:
    """Layers as they are called when the first of their group has the number 0."""
    groups: dict[tuple[str, str, str, str], list[tuple[str, _Part]]] = {}
    for name in names:
        if (part := _Part.of(name)) is not None:
            groups.setdefault((part.prefix, part.stem, part.kind, part.suffix), []).append((name, part))
    numbered = {}
    for group in groups.values():
        first = min(split_name(part.layer)[1] for _, part in group)
        for name, part in group:
            text, number = split_name(part.layer)
            base = text if part.layer != text else f"{text}_"
            numbered[name] = str(part._replace(layer=f"{base}{number - first}"))
    return numbered


# ---- values ----------------------------------------------------------------------------------------------------------


def fill(
    checkpoint: Mapping[str, Array], aliases: Mapping[str, str], targets: Mapping[str, Sequence[int]]
) -> dict[str, Array] | None:
    """A value for each variable of a model; None where the checkpoint has all under their own names.

    Several names with one name in the checkpoint are partitions of it, which is cut along axis 0; those of several
    layers get one each.

    Args:
        checkpoint: Whole variables by name, as `merge_partitions` gives them.
        aliases: Name in the checkpoint by name in the model.
        targets: Shapes by name in the model.

    Raises:
        CheckpointError: A variable has no name in the checkpoint, or no value of its shape there.
    """
    if infer_variable_names(map(node_name, targets)) <= checkpoint.keys():
        return None
    unknown = sorted(name for name in targets if aliases.get(name) not in checkpoint)
    if unknown:
        raise CheckpointError(f"the checkpoint has no variables for {unknown}; it has {sorted(checkpoint)}")
    groups: dict[tuple[str, str], list[str]] = {}
    for name in targets:
        groups.setdefault((aliases[name], _whole(node_name(name))), []).append(name)
    values: dict[str, Array] = {}
    for (old, _), names in groups.items():
        names.sort(key=_partition)
        whole = checkpoint[old]
        rows = [int(targets[name][0]) if targets[name] else 1 for name in names]
        pieces = [whole] if len(names) == 1 else np.split(whole, np.cumsum(rows)[:-1])
        for name, piece in zip(names, pieces, strict=True):
            if piece.shape != tuple(targets[name]):
                raise CheckpointError(
                    f"{name!r} has the shape {tuple(targets[name])}, and {old!r} gives it {piece.shape}"
                )
            values[name] = piece
    return {name: values[name] for name in targets}


def merge_partitions(values: Mapping[str, Array]) -> dict[str, Array]:
    """Variables by name, partitions of one joined along axis 0 in the order of their numbers."""
    groups: dict[str, list[str]] = {}
    for name in values:
        groups.setdefault(_whole(name), []).append(name)
    return {
        whole: values[names[0]]
        if len(names) == 1
        else np.concatenate([values[name] for name in sorted(names, key=_partition)])
        for whole, names in groups.items()
    }


def _partition(name: str) -> int:
    found = _PARTITION.fullmatch(node_name(name))
    return 0 if found is None else int(found[1])
