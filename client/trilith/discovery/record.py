"""ClusterRecord: what a cluster is, kept where its members are found, so that whoever disagrees is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from trilith.errors import ClusterMismatchError, InternalError, TableMismatchError
from trilith.routing import OWNER_RULE
from trilith.tables.differences import explain, same_table
from trilith_proto import ps_pb2

__all__ = ["ClusterRecord", "RecordKeeper"]

_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """What all members of a cluster agree on.

    Attributes:
        num_ps: Number of PS.
        owner_rule: Which PS owns an id.
        tables: Config by name.
        features: Name of its table by feature.
    """

    num_ps: int
    owner_rule: str = OWNER_RULE
    tables: Mapping[str, ps_pb2.TableConfig] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The body of the record's node."""
        from google.protobuf.json_format import MessageToDict

        tables = {
            name: MessageToDict(self.tables[name], preserving_proto_field_name=True) for name in sorted(self.tables)
        }
        content = {
            "version": _VERSION,
            "num_ps": self.num_ps,
            "owner_rule": self.owner_rule,
            "tables": tables,
            "features": dict(sorted(self.features.items())),
        }
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, body: bytes) -> ClusterRecord:
        """Read what `to_json` wrote.

        Raises:
            InternalError: It is something else.
        """
        from google.protobuf.json_format import ParseDict, ParseError

        try:
            content: dict[str, Any] = json.loads(body)
            if content["version"] != _VERSION:
                raise ClusterMismatchError(
                    f"the cluster's record is of version {content['version']}; this side reads version {_VERSION}"
                )
            return cls(
                num_ps=int(content["num_ps"]),
                owner_rule=str(content["owner_rule"]),
                tables={name: ParseDict(each, ps_pb2.TableConfig()) for name, each in content["tables"].items()},
                features=dict(content["features"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, ParseError) as error:
            raise InternalError(f"the cluster's record cannot be read ({type(error).__name__}: {error})") from None

    def check(self, ours: ClusterRecord, who: str) -> None:
        """Refuse `ours`, of whom `who` names, if it contradicts this record.

        Raises:
            ClusterMismatchError: Number of PS, owner rule or a feature's table differ; the message shows both sides.
            TableMismatchError: A table's config differs.
        """
        recorded = f"{self.num_ps} PS with owner rule {self.owner_rule!r}"
        wanted = f"{ours.num_ps} PS with owner rule {ours.owner_rule!r}"
        if recorded != wanted:
            raise ClusterMismatchError(
                f"the cluster is recorded as {recorded}; {who} has {wanted}."
                " `trilith discovery forget` clears the record when a cluster shall change"
            )
        for name, config in ours.tables.items():
            known = self.tables.get(name, config)
            if not same_table(known, config):
                raise TableMismatchError(
                    f"table {name!r} is recorded with another config than {who} has:"
                    f" {explain(name, known, config, where='in the record')}"
                )
        for feature, table in ours.features.items():
            if self.features.get(feature, table) != table:
                raise ClusterMismatchError(
                    f"feature {feature!r} is recorded as of table {self.features[feature]!r}; {who} has it of {table!r}"
                )

    def merged(self, ours: ClusterRecord) -> ClusterRecord:
        """This record with the tables and features of `ours`, which must not contradict it."""
        return ClusterRecord(
            num_ps=self.num_ps,
            owner_rule=self.owner_rule,
            tables={**ours.tables, **self.tables},
            features={**self.features, **ours.features},
        )


@runtime_checkable
class RecordKeeper(Protocol):
    """A directory that keeps its cluster's record."""

    def read_record(self) -> ClusterRecord | None:
        """The record; None if there is none yet."""

    def agree(self, ours: ClusterRecord, who: str) -> ClusterRecord:
        """Add what the record lacks, in one step with all others who do so; returns the record as it is then.

        Args:
            ours: What this side knows.
            who: Names this side, for messages.

        Raises:
            ClusterMismatchError: `ours` contradicts the record, which was not changed.
        """
