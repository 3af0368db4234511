"""Export folders: what an exported model consists of, and which versions a base directory holds.

    BASE/<version>/                 a standalone export
        manifest.json               written last, so an export is complete or absent; names every file with its CRC-32C
        program.json                the graph (`trilith.nn.program`); program.NAME.json that of another signature
        weights.safetensors         parameters, buffers and constants of the graph
        model.json                  features, inputs, outputs, table configs
        warmup.jsonl                requests that an entry scores first, where there are any, a line each
        rows/                       serving rows, in the form of a checkpoint of one PS
    BASE/entry/<version>/           the same without rows: a distributed export
    BASE/ps_<i>/<version>/          shard i's serving rows: rows/ as in a standalone export, and a manifest

Versions are Unix seconds and grow strictly; all parts of a distributed export have one version. `entry` comes last.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trilith.errors import CheckpointError, InvalidRequestError
from trilith.folder import Folder
from trilith.ops.combiners import Combiner, CombinerLike, combiner_of
from trilith.runtime.checked_json import read_json
from trilith_proto import ps_pb2

__all__ = [
    "ENTRY",
    "GRAPH",
    "MANIFEST",
    "MODEL",
    "ROWS",
    "SERVING_DEFAULT",
    "WARM_UP",
    "WEIGHTS",
    "ExportManifest",
    "ModelConfig",
    "ProgramInput",
    "RecordFeature",
    "ServedFeature",
    "Signature",
    "check_signature_name",
    "entry_base",
    "graph_name",
    "list_versions",
    "new_version",
    "prune_versions",
    "ps_base",
    "ps_bases",
    "read_export",
    "read_file",
    "write_manifest",
    "write_model",
]

MANIFEST = "manifest.json"
GRAPH = "program.json"
WEIGHTS = "weights.safetensors"
MODEL = "model.json"
WARM_UP = "warmup.jsonl"
ROWS = "rows"
ENTRY = "entry"
SERVING_DEFAULT = "serving_default"
"""The signature that is meant where none is named."""

FORMAT = "trilith-export"
_VERSION = 1

_SHARD = re.compile(r"ps_[0-9]+")
_SIGNATURE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")

Mode = Literal["standalone", "distributed"]


@dataclass(frozen=True, slots=True, init=False)
class ServedFeature:
    """One feature whose ids are looked up.

    Attributes:
        table: Its table.
        combiner: How its rows become one vector.
        feature: Name in the records; the feature's own by default.
        slot: Slot of flat fids in Instances, where the feature has no name there; None: it has one.
        newest: Whether "first" keeps a record's last ids rather than its first ones.
        weights: Name in the records of what the rows are multiplied by, a number for each id; None: nothing.
        strings: Whether ids may be text, which stands for its `trilith.ops.strings.hash_strings`.
    """

    table: str
    combiner: Combiner
    feature: str | None
    slot: int | None
    newest: bool
    weights: str | None
    strings: bool

    def __init__(
        self,
        *,
        table: str,
        combiner: CombinerLike = "mean",
        n: int = 0,
        feature: str | None = None,
        slot: int | None = None,
        newest: bool = False,
        weights: str | None = None,
        strings: bool = False,
    ) -> None:
        # Files, and callers of before, have kind and n apart.
        whole = Combiner(combiner, n) if combiner == "first" or n else combiner_of(combiner)  # type: ignore[arg-type]
        if weights is not None and (whole.n or slot is not None):
            raise InvalidRequestError(
                f"weights={weights!r} of ids that are {f'of slot {slot}' if slot is not None else whole}; only named "
                "features that become one vector have any"
            )
        given = {"table": table, "combiner": whole, "feature": feature, "slot": slot}
        for name, value in {**given, "newest": newest, "weights": weights, "strings": strings}.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        found = {**asdict(self), "combiner": self.combiner.kind, "n": self.combiner.n}
        for name in ("newest", "weights", "strings"):
            if not found[name]:
                del found[name]  # who does not know it reads the others
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInput:
    """One tensor the program takes.

    Attributes:
        kind: "stacked": the features' vectors, float32[b, F, dim]; "feature": one feature's vector, float32[b, dim], or
            float32[b, n, dim] of first rows; "mask": of a feature with n rows, float32[b, n], 1 where there is an id, 0
            behind the last; "dense": numbers of the records, float32[b, dim].
        names: The features; of "dense" the name in the records.
        dim: Elements, of "dense".
        pad: Of "dense": shorter lists are filled up with zeros and longer ones cut, as `Dense(lengths="fit")` does in
            training; otherwise a record whose list has not `dim` numbers is refused.
    """

    kind: Literal["stacked", "feature", "mask", "dense"]
    names: tuple[str, ...]
    dim: int = 0
    pad: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("stacked", "feature", "mask", "dense"):
            raise InvalidRequestError(f"input kind {self.kind!r} is none of stacked, feature, mask, dense")
        if not self.names or isinstance(self.names, str):
            raise InvalidRequestError(f"a {self.kind} input of names={self.names!r}; it takes a tuple of feature names")
        if self.kind != "stacked" and len(self.names) != 1:
            raise InvalidRequestError(f"a {self.kind} input takes one name, not {list(self.names)}")
        if self.kind == "dense" and self.dim < 1:
            raise InvalidRequestError(
                f"dense input {self.names[0]!r} has dim={self.dim}; it takes how many numbers a record has, at least 1"
            )
        if self.kind != "dense" and self.dim:
            raise InvalidRequestError(
                f"a {self.kind} input of {list(self.names)} takes no dim (dim={self.dim}): its size is that of its "
                "table's rows; only a dense input has one"
            )
        if self.kind != "dense" and self.pad:
            raise InvalidRequestError(f"a {self.kind} input of {list(self.names)} takes no pad; only a dense one does")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFeature:
    """What a model takes of the feature that has one name in records.

    Attributes:
        kind: "ids"; "dense"; "weights", a number for each id of another feature; or "both", ids that are dense numbers,
            too.
        dim: Numbers, of "dense" and "both".
        pad: Whether another count of numbers will do.
        strings: Whether ids may be text.
    """

    kind: Literal["ids", "dense", "weights", "both"]
    dim: int = 0
    pad: bool = False
    strings: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One program of a model.

    Attributes:
        inputs: What it takes, in order.
        outputs: Names of what it gives, in order.
    """

    inputs: tuple[ProgramInput, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.outputs or len(set(self.outputs)) < len(self.outputs):
            raise InvalidRequestError(f"outputs {list(self.outputs)}: names that differ, at least one")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What an entry needs to know to run the programs of a model.

    Attributes:
        name: Of the model.
        features: By name.
        inputs: What the program takes, in order.
        outputs: Names of what it gives, in order.
        signatures: Further programs, by name; the first is "serving_default".
        tables: Serving configs of the tables.
        num_ps: Shards of the training cluster, and so of its serving replicas.
    """

    name: str
    features: Mapping[str, ServedFeature]
    inputs: tuple[ProgramInput, ...]
    outputs: tuple[str, ...]
    tables: tuple[ps_pb2.TableConfig, ...]
    num_ps: int
    signatures: Mapping[str, Signature] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {config.name for config in self.tables}
        for name, feature in self.features.items():
            if feature.table not in known:
                raise InvalidRequestError(f"feature {name!r} is of table {feature.table!r}; there are {sorted(known)}")
        for each in self.every_input:
            missing = [name for name in each.names if each.kind != "dense" and name not in self.features]
            if missing:
                raise InvalidRequestError(f"an input wants features {missing}; there are {sorted(self.features)}")
            if each.kind == "stacked":
                self._check_stacked(each.names)
            if each.kind == "mask" and not self.features[each.names[0]].combiner.n:
                raise InvalidRequestError(f"a mask of {each.names[0]!r}, whose rows become one vector: it has none")
        for name in self.signatures:
            check_signature_name(name)
        Signature(inputs=self.inputs, outputs=self.outputs)
        self._check_weights()
        sizes: dict[str, int] = {}
        for each in self.every_input:
            if each.kind == "dense" and not each.pad and sizes.setdefault(each.names[0], each.dim) != each.dim:
                raise InvalidRequestError(
                    f"dense inputs {each.names[0]!r} of dim={sizes[each.names[0]]} and dim={each.dim}: "
                    "no record has both; give pad=True where lists may be cut"
                )

    @property
    def every_input(self) -> tuple[ProgramInput, ...]:
        """What the programs take, all of them together."""
        return tuple(
            dict.fromkeys(self.inputs + tuple(each for own in self.signatures.values() for each in own.inputs))
        )

    def signature(self, name: str = "") -> Signature:
        """One of the programs; empty: the first.

        Raises:
            InvalidRequestError: There is none of this name.
        """
        if name in ("", SERVING_DEFAULT):
            return Signature(inputs=self.inputs, outputs=self.outputs)
        if name not in self.signatures:
            there = ", ".join([SERVING_DEFAULT, *sorted(self.signatures)])
            raise InvalidRequestError(f"model {self.name!r} has no signature {name!r}; it has {there}")
        return self.signatures[name]

    def looked_at(self, name: str = "") -> list[str]:
        """Names in records of what a signature's program takes."""
        found = [
            (self.features[each].feature or each) if wanted.kind != "dense" else each
            for wanted in self.signature(name).inputs
            for each in wanted.names
        ]
        return list(dict.fromkeys(found))

    def record_features(self) -> dict[str, RecordFeature]:
        """What records may hold, by the name that they have for it."""
        found: dict[str, RecordFeature] = {}
        for own, feature in self.features.items():
            name = feature.feature or own
            strings = feature.strings or (name in found and found[name].strings)
            found[name] = RecordFeature(kind="ids", strings=strings)
        for feature in self.features.values():
            if feature.weights is not None:
                found[feature.weights] = RecordFeature(kind="weights")
        for each in self.every_input:
            if each.kind == "dense":
                name = each.names[0]
                before = found.get(name)
                kind: Literal["dense", "both"] = "both" if before is not None and before.kind != "dense" else "dense"
                if before is None or before.kind != "dense" or before.pad:
                    found[name] = RecordFeature(kind=kind, dim=each.dim, pad=each.pad)
        return found

    def _check_weights(self) -> None:
        """Weights are a feature of their own."""
        columns = {each.feature or name for name, each in self.features.items()}
        columns |= {each.names[0] for each in self.every_input if each.kind == "dense"}
        for name, feature in self.features.items():
            if feature.weights in columns:
                raise InvalidRequestError(
                    f"the weights of feature {name!r} are {feature.weights!r} in records, which the model takes as ids "
                    "or as dense numbers, too"
                )

    def _check_stacked(self, names: Sequence[str]) -> None:
        features = [self.features[name] for name in names]
        dims = {self.dim_of(feature.table) for feature in features}
        if len(dims) > 1 or any(feature.combiner.n for feature in features):
            raise InvalidRequestError(f"features {list(names)} have no vectors of one size and cannot be stacked")

    def dim_of(self, table: str) -> int:
        """Floats per row."""
        config = next(config for config in self.tables if config.name == table)
        return sum(segment.dim_size for segment in config.hash_table.entry_config.segments)

    def shapes(self, signature: str = "") -> list[tuple[int, ...]]:
        """Shapes of the inputs of a signature without the batch."""
        found: list[tuple[int, ...]] = []
        for each in self.signature(signature).inputs:
            if each.kind == "dense":
                found.append((each.dim,))
                continue
            feature = self.features[each.names[0]]
            if each.kind == "mask":
                found.append((feature.combiner.n,))
                continue
            dim = self.dim_of(feature.table)
            found.append((len(each.names), dim) if each.kind == "stacked" else feature.combiner.shape(dim))
        return found

    def to_json(self) -> bytes:
        """Content of `model.json`."""
        from google.protobuf.json_format import MessageToDict

        content = {
            "name": self.name,
            "features": {name: feature.to_json() for name, feature in self.features.items()},
            "inputs": [_input_json(each) for each in self.inputs],
            "outputs": self.outputs,
            "tables": [MessageToDict(config, preserving_proto_field_name=True) for config in self.tables],
            "num_ps": self.num_ps,
        }
        if self.signatures:
            content["signatures"] = {
                name: {"inputs": [_input_json(each) for each in own.inputs], "outputs": own.outputs}
                for name, own in self.signatures.items()
            }
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes, where: str) -> ModelConfig:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: It is something else.
        """
        from google.protobuf.json_format import ParseDict, ParseError

        try:
            body = json.loads(content)
            return cls(
                name=str(body["name"]),
                features={name: ServedFeature(**each) for name, each in body["features"].items()},
                inputs=_inputs(body),
                outputs=tuple(map(str, body["outputs"])),
                signatures={
                    name: Signature(inputs=_inputs(own), outputs=tuple(map(str, own["outputs"])))
                    for name, own in body.get("signatures", {}).items()
                },
                tables=tuple(ParseDict(each, ps_pb2.TableConfig()) for each in body["tables"]),
                num_ps=int(body["num_ps"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, ParseError) as error:
            raise CheckpointError(f"{where}: no model config ({type(error).__name__}: {error})") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportManifest:
    """A complete export.

    Attributes:
        version: Larger is newer.
        mode: Where the rows are.
        shard: Whose rows a `ps_<i>` export holds; -1 for a model.
        step: The model's step in the checkpoint.
        checkpoint: Path of the checkpoint.
        checkpoint_unix_s: When that was begun to be written, at the latest.
        created_unix_s: When the export was.
        files: CRC-32C by name of every file of the export's own folder.
    """

    version: int
    mode: Mode
    shard: int = -1
    step: int
    checkpoint: str
    checkpoint_unix_s: float
    created_unix_s: float
    files: Mapping[str, int] = field(default_factory=dict)


def entry_base(base: str) -> str:
    """Where the models of a base directory are: below `entry`, unless its exports are standalone."""
    folder = Folder(base)
    return folder.child(ENTRY).url if ENTRY in folder.names() else folder.url


def ps_base(base: str, shard: int) -> str:
    """Where the serving rows of a shard are."""
    return Folder(base).child(f"ps_{shard}").url


def ps_bases(base: str) -> list[str]:
    """Where there are serving rows: of the shards that training has now, and of those that it had before."""
    folder = Folder(base)
    return [folder.child(name).url for name in folder.names() if _SHARD.fullmatch(name)]


def list_versions(base: str) -> list[int]:
    """The complete versions directly below `base`, oldest first."""
    folder = Folder(base)
    # Listed, not asked for: a file system that fails says so here.
    return sorted(int(name) for name in _numbered(base) if MANIFEST in folder.child(name).names())


def new_version(base: str, *, clock: Callable[[], float] = time.time) -> int:
    """A version above all that are there, complete or not: Unix seconds, or the next number."""
    found = [int(name) for root in (base, Folder(base).child(ENTRY).url) for name in _numbered(root)]
    return max(int(clock()), max(found, default=0) + 1)


def _numbered(base: str) -> list[str]:
    return [name for name in Folder(base).names() if name.isascii() and name.isdecimal() and name == str(int(name))]


def check_signature_name(name: str) -> None:
    """Refuse what cannot be a signature's, beside the first.

    Raises:
        InvalidRequestError: It is taken, or not part of the name of a file.
    """
    if not _SIGNATURE.fullmatch(name) or name == SERVING_DEFAULT:
        raise InvalidRequestError(
            f"signature {name!r}: a name is letters, digits, - and _, beginning with a letter, at most 64, and not "
            f"{SERVING_DEFAULT}, which has everything"
        )


def graph_name(signature: str) -> str:
    """Name of the file with a signature's program."""
    return GRAPH if signature in ("", SERVING_DEFAULT) else f"program.{signature}.json"


def write_model(
    folder: Folder, model: ModelConfig, graphs: Mapping[str, bytes], weights: bytes, *, warm_up: bytes = b""
) -> dict[str, int]:
    """Write a model's files, `graphs` by signature; returns their checksums."""
    contents = {graph_name(name): graph for name, graph in graphs.items()}
    contents |= {WEIGHTS: weights, MODEL: model.to_json()} | ({WARM_UP: warm_up} if warm_up else {})
    for name, content in contents.items():
        folder.write(name, content)
    return {name: _crc(content) for name, content in contents.items()}


def write_manifest(folder: Folder, manifest: ExportManifest) -> None:
    """Declare an export complete."""
    body = {"format": FORMAT, "format_version": _VERSION, **asdict(manifest)}
    folder.write(MANIFEST, json.dumps(body, indent=1).encode() + b"\n")


def read_export(path: str) -> ExportManifest:
    """What a complete export consists of.

    Raises:
        CheckpointError: There is none, or its manifest is damaged.
    """
    folder = Folder(path)
    where = folder.path(MANIFEST)
    try:
        raw = folder.read(MANIFEST)
        body = json.loads(raw)
        if (body["format"], body["format_version"]) != (FORMAT, _VERSION):
            raise ValueError(f"not of format {FORMAT!r}, version {_VERSION}")
        return read_json(ExportManifest, raw)
    except FileNotFoundError:
        raise CheckpointError(f"{where}: missing; the export was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: no manifest of an export ({error})") from None


def read_file(folder: Folder, manifest: ExportManifest, name: str) -> bytes:
    """A file of an export, checked.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    where = folder.path(name)
    try:
        content = folder.read(name)
    except FileNotFoundError:
        raise CheckpointError(f"{where}: missing, though the manifest names it") from None
    if _crc(content) != manifest.files.get(name):
        raise CheckpointError(f"{where}: damaged: its content does not match its checksum")
    return content


def prune_versions(base: str, keep: int, parts: Sequence[str] = (), *, but: Collection[int] = ()) -> list[int]:
    """Delete versions below `base`, and in `parts`, that are neither the newest `keep` nor in `but`; returns which."""
    gone = [version for version in list_versions(base)[: -max(keep, 1)] if version not in but]
    for version in gone:
        for root in (base, *parts):
            folder = Folder(root).child(str(version))
            folder.remove(MANIFEST)  # first, so that what is left halfway is no export
            folder.remove_all()
    return gone


def _inputs(body: Mapping[str, Any]) -> tuple[ProgramInput, ...]:
    return tuple(ProgramInput(**{**each, "names": tuple(each["names"])}) for each in body["inputs"])


def _input_json(given: ProgramInput) -> dict[str, Any]:
    found = asdict(given)
    if not given.pad:
        del found["pad"]  # who does not know it reads the others
    return found


def _crc(content: bytes) -> int:
    import google_crc32c

    return int(google_crc32c.value(content))
