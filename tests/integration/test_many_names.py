"""Two thousand names: what a page, a look-up and a name cost does not grow with the table, and stays within bounds."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from loraplex_adapter_store import wire
from loraplex_adapter_store.aliases import AliasTable
from loraplex_adapter_store.lifecycle import Caller, Lifecycle
from loraplex_adapter_store.repository.catalog import Catalog
from loraplex_adapter_store.repository.moves import AliasMoves
from loraplex_adapter_store.visibility import Visibility
from loraplex_adapter_store.watchers import Watchers
from loraplex_common.alias_feed import AdapterEntry, entry_of
from loraplex_common.auth import Principal, Role
from loraplex_common.base_model import load_base_model
from loraplex_common.ids import AdapterRef
from loraplex_common.valkey import connect
from loraplex_gateway.adapters.names import NameTable
from support.many_names import digest_of, name_of, write_names
from support.store_rig import tiny_base_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_adapter_store.repository import keys

NUM = 2000
MAX_STORE_BYTES = 2048
MAX_GATEWAY_BYTES = 2200
ADMIN = Caller(Principal(name="admin", role=Role.ADMIN))


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[keys.Client]:
    async with connect(redis_url) as valkey:
        await write_names(valkey, load_base_model(tiny_base_dir()), NUM, revisions=2)
        yield valkey


def catalog_of(client: keys.Client) -> Catalog:
    return Catalog(client, gc_grace_s=60.0, check_name=lambda _: None)


async def commands(client: keys.Client) -> Counter[str]:
    """Return how often the server has run each command, those of scripts included."""
    found = await client.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): int(counts["calls"]) for name, counts in found.items()})


async def test_a_page_reads_one_record_more_than_it_shows_in_one_command(client: keys.Client) -> None:
    lifecycle = Lifecycle(catalog_of(client), AliasMoves(client), _no_leases, _told, lambda _: None)

    for page_size in (100, 1000):
        before = await commands(client)
        page, following = await lifecycle.page(
            page_size=page_size, after="team-5", prefix="", show_deleted=False, caller=ADMIN
        )

        assert (len(page), following) == (page_size, page[-1].name)
        after = await commands(client)
        assert after["hget"] - before["hget"] == page_size + 1
        assert after["eval"] - before["eval"] == 1


async def test_a_revision_that_the_table_has_is_not_read_again(client: keys.Client) -> None:
    catalog = catalog_of(client)
    table = AliasTable(client, catalog, (), Watchers(client))
    lifecycle = Lifecycle(catalog, AliasMoves(client), _no_leases, _told, table.revisions_of)
    await table._reload()
    records, _ = await lifecycle.page(page_size=100, after="", prefix="", show_deleted=False, caller=ADMIN)
    before = await commands(client)

    _, wanted, latest = await lifecycle.get(AdapterRef.parse(name_of(7)), ADMIN)
    revisions, _ = await lifecycle.revisions(name_of(7), page_size=10, offset=0, caller=ADMIN)
    page = await lifecycle.latest_of(records)

    assert latest == wanted == revisions[0]
    assert [revision.revision for revision in revisions] == [digest_of(7, 1), digest_of(7, 0)]
    assert page.keys() == {record.labels["latest"] for record in records}
    assert (await commands(client))["mget"] == before["mget"]


async def test_a_revision_that_the_table_does_not_have_yet_is_read(client: keys.Client) -> None:
    catalog = catalog_of(client)
    table = AliasTable(client, catalog, (), Watchers(client))
    lifecycle = Lifecycle(catalog, AliasMoves(client), _no_leases, _told, table.revisions_of)
    await table._reload()
    await lifecycle.set_alias(name_of(7), "prod", {digest_of(8, 0): 1}, None, ADMIN)

    _, wanted, latest = await lifecycle.get(AdapterRef.parse(f"{name_of(7)}:prod"), ADMIN)

    assert wanted is not None
    assert latest is not None
    assert (wanted.revision, latest.revision) == (digest_of(8, 0), digest_of(7, 1))


async def test_the_garbage_collector_looks_at_none_of_the_table(client: keys.Client) -> None:
    table = AliasTable(client, catalog_of(client), (), Watchers(client))
    before = tracked()

    await table._reload()

    assert len(table._views) == NUM
    assert tracked() - before < NUM / 10


async def test_a_table_that_is_read_again_keeps_what_is_as_it_was_and_tells_the_rest(client: keys.Client) -> None:
    catalog = catalog_of(client)
    table = AliasTable(client, catalog, (), Watchers(client))
    await table._reload()
    before = dict(table._views)
    lifecycle = Lifecycle(catalog, AliasMoves(client), _no_leases, _told, table.revisions_of)
    await lifecycle.set_alias(name_of(7), "prod", {digest_of(7, 0): 1}, None, ADMIN)
    watch = table.watch(table._position.sequence)
    told = asyncio.create_task(anext(watch))
    await asyncio.sleep(0)

    await table._reload()

    assert [view.record.name for view in (await told).views] == [name_of(7)]
    assert [name for name, view in table._views.items() if view is not before[name]] == [name_of(7)]
    await watch.aclose()


def tracked() -> int:
    """Return how many objects a full collection looks at."""
    gc.collect()
    return len(gc.get_objects())


async def test_a_name_with_two_revisions_takes_under_two_kilobytes_of_a_store_and_of_a_gateway(
    client: keys.Client,
) -> None:
    table = AliasTable(client, catalog_of(client), (), Watchers(client))
    gc.collect()
    tracemalloc.start()
    try:
        await table._reload()
        in_store = grown()
        entries = sent(table)
        del table
        names = NameTable()
        names.replace_all(entries)
        del entries
        in_gateway = grown()
    finally:
        tracemalloc.stop()

    assert in_store / NUM < MAX_STORE_BYTES
    assert in_gateway / NUM < MAX_GATEWAY_BYTES
    assert len(list(names.visible_to(ADMIN.tenant))) == NUM
    assert names.entry(name_of(7), ADMIN.tenant).labels == {"latest": digest_of(7, 1)}  # type: ignore[union-attr]


def grown() -> int:
    """Return the memory that is in use and was not when tracing began."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def sent(table: AliasTable) -> list[AdapterEntry]:
    """Return the table as a gateway reads it from messages."""
    return [entry_of(entry) for update in table._snapshot() for entry in wire.alias_update(update).entries]


async def _no_leases() -> dict[str, int]:
    return {}


async def _told(record: object) -> Visibility:
    return Visibility()
