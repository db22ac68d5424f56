"""Very many adapters in a catalog, written as imports write them but without their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_adapter_store.records import AdapterRecord, Answer, Revision
from loraplex_adapter_store.repository import keys, scripts
from loraplex_adapter_store.repository.commit_words import commit_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.base_model import BaseModelInfo

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH = 250
CREATED = 1_790_000_000.0


def name_of(number: int) -> str:
    """Return the name of an adapter."""
    return f"team-{number % 977}/adapter-{number:06}"


def digest_of(number: int, version: int) -> str:
    """Return the digest of one of its two revisions, 0 the older."""
    return f"{(2 * number + version + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 256):064x}"


def revision_of(number: int, version: int, base: BaseModelInfo) -> Revision:
    """Return what an import stores of a revision."""
    return Revision(
        revision=digest_of(number, version),
        name=name_of(number),
        base_fingerprint=base.fingerprint,
        max_rank=16,
        num_parameters=41_943_040,
        canonical_bytes=83_886_080,
        target_modules=MODULES,
        num_layers=32,
        source=f"file:///adapters/{name_of(number)}/{version}",
        create_time=CREATED + number + version / 2,
    )


async def write_names(client: keys.Client, base: BaseModelInfo, count: int, *, revisions: int = 1) -> None:
    """Write adapters through the script that an import commits with, many in each round trip.

    Args:
        client: Of the store's Valkey.
        base: Their base model.
        count: Adapters 0 to ``count`` - 1.
        revisions: Revisions of each, 1 or 2.
    """
    commit = await client.script_load(scripts.COMMIT)
    for start in range(0, count, BATCH):
        async with client.pipeline(transaction=False) as pipeline:
            for number in range(start, min(start + BATCH, count)):
                for names, values in commits(number, base, revisions):
                    pipeline.evalsha(commit, len(names), *names, *values)
            for status, detail in await pipeline.execute():
                assert status == b"ok", (status, detail)


def commits(number: int, base: BaseModelInfo, revisions: int) -> Sequence[tuple[list[str], list[object]]]:
    """Return keys and values of the commits of an adapter's imports."""
    found = []
    record = AdapterRecord(name=name_of(number))
    for version in range(revisions):
        revision = revision_of(number, version, base)
        new = record.with_import(revision.revision, "", revision.create_time, is_staged=False)
        answer = Answer("import", record.name, revision.revision)
        found.append(commit_words(record, new, revision, "", answer, 0))
        record = AdapterRecord.from_json(new.to_json())
    return found
