"""feature_list.conf: the file in which a team names its features, their slots and where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trilith.data.formats.streams import open_file
from trilith.errors import DataError, InvalidRequestError

__all__ = ["Cache", "Feature", "FeatureList", "Feed"]

_TRUE = frozenset({"true", "yes", "t", "y", "1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Something the producer feeds into features."""

    feed_name: str
    shared: bool = False
    feature_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A cache of the producer's."""

    cache_column: str | None = None
    cache_name: str | None = None
    capacity: int | None = None
    timeout: int | None = None
    cache_type: str | None = None
    cache_key_class: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One feature."""

    feature_name: str
    depend: tuple[str, ...] = ()
    method: str | None = None
    slot: int | None = None
    args: tuple[str, ...] = ()
    feature_version: int | None = None
    shared: bool = False
    cache_keys: tuple[str, ...] = ()
    need_raw: bool = False
    feature_id: int | None = None
    input_optional: tuple[bool, ...] = ()
    feature_group: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The short name: without `fc_` at the beginning of its terms, or `f_` at its own."""
        full = self.feature_name.lower()
        terms = (
            term[3:] if term.startswith("fc_") else term[2:] if full.startswith("f_") else term
            for term in full.split("-")
        )
        return "-".join(terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureList:
    """A parsed feature_list.conf.

    Attributes:
        column_name: Columns of the raw data.
        feeds: By `feed_name`.
        caches: By `cache_name`; what a `cache_column:` line names is under "cache_column".
        features: By `feature_name`, in the file's order.
    """

    column_name: frozenset[str] = frozenset()
    feeds: Mapping[str, Feed] = field(default_factory=dict)
    caches: Mapping[str, Cache] = field(default_factory=dict)
    features: Mapping[str, Feature] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str) -> FeatureList:
        """Read a file, by path or any URL that fsspec knows."""
        with open_file(path) as file:
            data = file.read()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8") from None
        return cls.parse(text.splitlines(), source=path)

    @classmethod
    def parse(cls, lines: Iterable[str], *, source: str = "feature_list") -> FeatureList:
        """Parse lines.

        Raises:
            DataError: A line has a value of the wrong type, or no name; the message names the line.
        """
        columns: set[str] = set()
        feeds: dict[str, Feed] = {}
        caches: dict[str, Cache] = {}
        features: dict[str, Feature] = {}
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            try:
                if line.startswith("column_name:"):
                    columns.update(_items(line.removeprefix("column_name:")))
                elif line.startswith("cache_column:"):
                    caches["cache_column"] = Cache(cache_column=line.removeprefix("cache_column:").strip())
                elif line.startswith("feed"):
                    feed = _made(Feed, _pairs(line))
                    feeds[feed.feed_name] = feed
                elif line.startswith("cache"):
                    cache = _made(Cache, _pairs(line))
                    caches[cache.cache_name or ""] = cache
                else:
                    feature = _made(Feature, _pairs(line))
                    features[feature.feature_name] = feature
            except (ValueError, TypeError) as error:
                raise DataError(f"{source}: line {number}: {error}: {line!r}") from None
        return cls(column_name=frozenset(columns), feeds=feeds, caches=caches, features=features)

    def __getitem__(self, key: str | int) -> Feature:
        found = self.get(key)
        if found is None:
            what = f"slot {key}" if isinstance(key, int) else repr(key)
            raise InvalidRequestError(
                f"the feature list has no feature for {what}; it has {len(self.features)} features"
            )
        return found

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | int) and self.get(key) is not None

    def __len__(self) -> int:
        return len(self.features)

    def get(self, key: str | int, default: Feature | None = None) -> Feature | None:
        """A feature by slot (the first that has it) or by name, full or short."""
        if isinstance(key, int):
            return next((each for each in self.features.values() if each.slot == key), default)
        return next((self.features[name] for name in _spellings(key) if name in self.features), default)


def _spellings(name: str) -> Iterable[str]:
    yield name
    yield f"f_{name}"
    yield f"fc_{name}"
    if "-" in name:
        for prefix in ("fc_", "f_"):
            yield "-".join(prefix + term for term in name.split("-"))


def _pairs(line: str) -> dict[str, str]:
    """The keys of a line with their values: a key is the last word before its `=`."""
    pieces = line.split("=")
    keys = [piece.rsplit(maxsplit=1)[-1] if piece.strip() else "" for piece in pieces[:-1]]
    values = {}
    for number, key in enumerate(keys):
        value = pieces[number + 1]
        if number + 1 < len(keys):
            value = value.rstrip()
            value = value[: len(value) - len(keys[number + 1])]
        values[key] = value.strip().rstrip(",; ")
    return values


def _items(text: str) -> list[str]:
    items = (item.strip().strip("\"'") for item in text.split(","))
    return [item for item in items if item]


def _made(cls: type[Any], pairs: Mapping[str, str]) -> Any:
    known = {each.name: str(each.type) for each in fields(cls)}
    return cls(**{key: _value(key, known[key], text) for key, text in pairs.items() if key in known})


def _value(key: str, kind: str, text: str) -> Any:
    if kind.startswith("tuple[bool"):
        return tuple(item == "true" for item in _items(text))
    if kind.startswith("tuple"):
        return tuple(_items(text))
    if kind.startswith("int"):
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{key}={text!r} is no integer") from None
    return text.lower() in _TRUE if kind == "bool" else text
