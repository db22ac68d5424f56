"""Very many adapters in a catalog, written as imports write them but without their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_adapter_store.records import AdapterRecord, Revision
from loraplex_adapter_store.repository import keys

if TYPE_CHECKING:
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
    """Write adapters into an empty catalog as it is after their imports; the stream of changes is left out.

    Args:
        client: Connection to the store's Valkey.
        base: Their base model.
        count: Adapters 0 to ``count`` - 1.
        revisions: Revisions of each, 1 or 2.
    """
    await client.set(keys.SEQUENCE, count * revisions)
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        async with client.pipeline(transaction=False) as pipeline:
            pipeline.zadd(keys.INDEX, {name_of(number): 0 for number in numbers})
            imported = [revision_of(number, version, base) for number in numbers for version in range(revisions)]
            pipeline.mset({keys.revision(revision.revision): revision.to_json() for revision in imported})
            for revision in imported:
                pipeline.sadd(keys.references(revision.revision), revision.name)
            for at, number in enumerate(numbers):
                record = AdapterRecord(name=name_of(number))
                for revision in imported[at * revisions : (at + 1) * revisions]:
                    record = record.with_import(revision.revision, "", revision.create_time, is_staged=False)
                pipeline.hset(
                    keys.adapter(record.name), mapping={"version": record.version, "record": record.to_json()}
                )
            await pipeline.execute()
