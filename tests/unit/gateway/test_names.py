"""Names resolve to digests from the store's table, and to nothing else."""

from __future__ import annotations

import asyncio

import pytest
from loraplex_common.alias_feed import AdapterEntry
from loraplex_common.errors import (
    AdapterForbiddenError,
    AdapterNotFoundError,
    InvalidParameterError,
    StoreUnavailableError,
)
from loraplex_gateway.names import NameTable

OLD, NEW = "a" * 64, "b" * 64


def entry(name: str = "poet", *, allowed: frozenset[str] = frozenset(), deleted: bool = False) -> AdapterEntry:
    labels = {} if deleted else {"latest": NEW, "prod": OLD}
    return AdapterEntry(
        name=name,
        labels=labels,
        base_fingerprints={OLD: "f", NEW: "f"},
        allowed_tenants=allowed,
        is_deleted=deleted,
    )


def table(*entries: AdapterEntry) -> NameTable:
    names = NameTable()
    names.replace_all(entries or (entry(),))
    return names


async def resolve(names: NameTable, text: str, tenant: str = "me", patience_s: float = 0.0) -> str:
    return (await names.resolve(text, tenant=tenant, patience_s=patience_s)).digest


@pytest.mark.parametrize(
    ("text", "digest"),
    [("poet", NEW), ("poet:latest", NEW), ("poet:prod", OLD), (f"poet@{OLD}", OLD), (f"poet@{OLD[:8]}", OLD)],
)
async def test_a_reference_resolves(text: str, digest: str) -> None:
    assert await resolve(table(), text) == digest


async def test_digits_that_several_revisions_of_a_name_begin_with_are_refused_with_both() -> None:
    twin = OLD[:12] + "0" * 52
    names = table(AdapterEntry(name="poet", labels={"latest": NEW}, base_fingerprints={OLD: "f", twin: "f"}))

    with pytest.raises(InvalidParameterError, match=f"{twin}, {OLD}"):
        await resolve(names, f"poet@{OLD[:12]}")


async def test_a_staged_adapter_that_no_label_points_at_is_asked_for_by_its_revision() -> None:
    names = table(AdapterEntry(name="poet", labels={}, base_fingerprints={OLD: "f"}))

    with pytest.raises(AdapterNotFoundError, match=f"staged.*poet@{OLD[:12]}"):
        await resolve(names, "poet")
    assert await resolve(names, f"poet@{OLD[:12]}") == OLD


async def test_an_unknown_name_is_refused_with_close_matches() -> None:
    with pytest.raises(AdapterNotFoundError, match="did you mean poet"):
        await resolve(table(), "peot")


async def test_close_matches_leave_out_what_the_tenant_may_not_see() -> None:
    names = table(entry("poet", allowed=frozenset({"vip"})))

    with pytest.raises(AdapterNotFoundError) as caught:
        await resolve(names, "peot")
    assert "poet" not in caught.value.message


@pytest.mark.parametrize(("text", "words"), [("poet:beta", "latest, prod"), ("poet@" + "c" * 64, "no revision")])
async def test_an_unknown_label_or_revision_is_refused(text: str, words: str) -> None:
    with pytest.raises(AdapterNotFoundError, match=words):
        await resolve(table(), text)


@pytest.mark.parametrize("text", ["../etc", "poet@short", "a b", "poet:", "x" * 200])
async def test_a_malformed_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameterError):
        await resolve(table(), text)


async def test_only_allowed_tenants_may_use_an_adapter() -> None:
    names = table(entry(allowed=frozenset({"vip"})))

    assert await resolve(names, "poet", tenant="vip") == NEW
    with pytest.raises(AdapterForbiddenError):
        await resolve(names, "poet", tenant="me")


async def test_a_deleted_name_is_gone() -> None:
    names = table()
    names.update([entry(deleted=True)])

    with pytest.raises(AdapterNotFoundError):
        await resolve(names, "poet")


async def test_without_a_table_nothing_is_said_about_a_name() -> None:
    with pytest.raises(StoreUnavailableError):
        await resolve(NameTable(), "poet")


async def test_a_name_on_its_way_is_waited_for() -> None:
    names = table(entry("other"))
    waiting = asyncio.create_task(resolve(names, "poet", patience_s=5.0))
    await asyncio.sleep(0)
    names.update([entry("third")])
    await asyncio.sleep(0)

    names.update([entry("poet")])

    assert await waiting == NEW


async def test_a_moved_label_counts_for_the_next_request() -> None:
    names = table()
    names.update([AdapterEntry(name="poet", labels={"latest": OLD}, base_fingerprints={OLD: "f"})])

    assert await resolve(names, "poet") == OLD
