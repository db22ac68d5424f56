"""Names resolve to digests from the store's table, and to nothing else."""

from __future__ import annotations

import asyncio

import pytest
from loraplex_common.alias_feed import AdapterEntry
from loraplex_common.auth import ANYBODY, Principal, Role
from loraplex_common.errors import (
    AdapterNotFoundError,
    InvalidParameterError,
    LoraplexError,
    StoreUnavailableError,
)
from loraplex_gateway.adapters.names import NameTable

OLD, NEW = "a" * 64, "b" * 64
ME, VIP = Principal(name="me"), Principal(name="vip")
OPS = Principal(name="ops", role=Role.ADMIN)


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


async def resolve(names: NameTable, text: str, caller: Principal = ME, patience_s: float = 0.0) -> str:
    return (await names.resolve(text, caller=caller, patience_s=patience_s)).digest


async def refused(names: NameTable, text: str, caller: Principal = ME) -> tuple[type[Exception], str, dict[str, str]]:
    with pytest.raises(LoraplexError) as caught:
        await resolve(names, text, caller)
    return type(caught.value), caught.value.message, caught.value.metadata


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


@pytest.mark.parametrize("caller", [VIP, OPS], ids=lambda caller: caller.name)
async def test_allowed_tenants_and_administrators_may_use_an_adapter(caller: Principal) -> None:
    names = table(entry(allowed=frozenset({"vip"})))

    assert await resolve(names, "poet", caller) == NEW
    assert [known.name for known in names.visible_to(caller)] == ["poet"]


@pytest.mark.parametrize("caller", [ME, ANYBODY], ids=lambda caller: caller.name)
@pytest.mark.parametrize("suffix", ["", ":prod", ":nope", f"@{OLD}", "@" + "c" * 64, f"@{OLD[:8]}"])
async def test_to_all_others_an_adapter_is_as_one_that_does_not_exist(caller: Principal, suffix: str) -> None:
    """The last reference is one that two revisions of the hidden name begin with."""
    twin = OLD[:12] + "0" * 52
    hidden = AdapterEntry(
        name="poet",
        labels={"latest": NEW, "prod": OLD},
        base_fingerprints={OLD: "f", twin: "f", NEW: "f"},
        allowed_tenants=frozenset({"vip"}),
    )

    refusal = await refused(table(hidden, entry("bard")), f"poet{suffix}", caller)

    assert refusal == await refused(table(entry("bard")), f"poet{suffix}", caller)
    assert refusal[0] is AdapterNotFoundError


async def test_a_hidden_name_is_waited_for_as_long_as_an_unknown_one() -> None:
    names = table(entry(allowed=frozenset({"vip"})))
    waiting = asyncio.create_task(resolve(names, "poet", patience_s=20.0))
    await asyncio.sleep(0)
    assert not waiting.done()

    names.update([entry(allowed=frozenset({"vip", "me"}))])

    assert await waiting == NEW


async def test_a_revision_is_found_under_no_name_but_its_own() -> None:
    hidden = AdapterEntry(
        name="secret", labels={"latest": OLD}, base_fingerprints={OLD: "f"}, allowed_tenants=frozenset({"vip"})
    )
    open_one = AdapterEntry(name="poet", labels={"latest": NEW}, base_fingerprints={NEW: "f"})
    names = table(hidden, open_one)

    for reference in (f"poet@{OLD}", f"poet@{OLD[:8]}", f"secret@{OLD}"):
        assert (await refused(names, reference))[0] is AdapterNotFoundError
    assert await resolve(names, f"secret@{OLD}", VIP) == OLD


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


async def test_an_adapter_on_further_bases_is_its_counterpart_there() -> None:
    names = table(
        AdapterEntry(
            name="poet",
            labels={"latest": OLD},
            base_fingerprints={OLD: "f", NEW: "g"},
            counterparts={OLD: (NEW, "ee" * 32)},  # one that is not told of, as its text parts are not read here
        )
    )

    poet = await names.resolve("poet", caller=ANYBODY, patience_s=0)

    assert poet.digest == OLD
    on = {base: found.digest for base in ("f", "g", "h") if (found := poet.on(base)) is not None}
    assert on == {"f": OLD, "g": NEW}
