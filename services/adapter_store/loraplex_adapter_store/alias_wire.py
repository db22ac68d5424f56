"""Converts labels, and their moves, between the contract's messages and the store's own types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from google.protobuf.timestamp_pb2 import Timestamp
from loraplex.v1 import adapter_pb2, adapter_store_pb2
from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_adapter_store.records import AdapterRecord
    from loraplex_adapter_store.repository.moves import AliasMove

MAX_SHARES: Final = 16
MAX_WEIGHT: Final = 1_000_000


def timestamp(seconds: float) -> Timestamp:
    """Convert Unix seconds."""
    message = Timestamp()
    fill_time(message, seconds)
    return message


def fill_time(message: Timestamp, seconds: float) -> None:
    """Write Unix seconds into an empty message."""
    message.seconds, message.nanos = int(seconds), int(seconds % 1 * 1e9)


def fill_aliases(
    message: adapter_pb2.Adapter | adapter_store_pb2.WatchAliasesResponse.Entry, record: AdapterRecord
) -> None:
    """Write a record's labels, sorted, into a message that has none."""
    for label, digest in sorted(record.labels.items()):
        alias = message.aliases.add()
        alias.name, alias.label, alias.revision = record.name, label, digest
        if label in record.splits:
            alias.shares.extend(_shares(record.splits[label]))


def _shares(shares: Mapping[str, int]) -> list[adapter_pb2.AliasShare]:
    return [adapter_pb2.AliasShare(revision=digest, weight=weight) for digest, weight in sorted(shares.items())]


def counterparts(record: AdapterRecord) -> list[adapter_pb2.Counterpart]:
    """Convert what a record says of its revisions on other base models, sorted."""
    return [
        adapter_pb2.Counterpart(revision=digest, base_model=base, counterpart=other)
        for digest, bases in sorted(record.counterparts.items())
        for base, other in sorted(bases.items())
    ]


def check_shares(alias: adapter_pb2.Alias) -> None:
    """Check the shares that a label is to have.

    Raises:
        InvalidParameterError: If there are too many, a weight is out of range, or a revision is given beside them.
    """
    if len(alias.shares) > MAX_SHARES:
        raise InvalidParameterError(f"{len(alias.shares)} shares, at most {MAX_SHARES}", field="alias.shares")
    for share in alias.shares:
        if not 0 < share.weight <= MAX_WEIGHT:
            raise InvalidParameterError(
                f"weight {share.weight} is not between 1 and {MAX_WEIGHT}", field="alias.shares.weight"
            )
    if alias.revision:
        raise InvalidParameterError("a label points at a revision or is split, not both", field="alias.revision")


def alias_move(move: AliasMove) -> adapter_store_pb2.AliasMove:
    """Convert a move of a label."""
    return adapter_store_pb2.AliasMove(
        label=move.label,
        left_revision=move.left,
        revision=move.revision,
        cause=move.cause,
        time=timestamp(move.time),
        shares=_shares(move.shares),
    )
