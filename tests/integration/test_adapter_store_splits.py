"""Labels that are split between revisions: set, told, kept, rolled back, and shown on the command line."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.repository import keys
from loraplex_common.errors import AdapterNotFoundError, ConflictError, InvalidParameterError
from loraplex_common.valkey import connect
from support.adapters import Recipe, write_adapter
from support.cli_runner import Result, Runner
from support.pushes import adapters_at, tensors_of
from support.store_rig import running_rig, store_config, tiny_base_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_adapter_store.service import RunningStore
    from loraplex_client import AsyncAdapters
    from support.store_rig import StoreClient

pytestmark = pytest.mark.integration


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[tuple[RunningStore, StoreClient]]:
    async with running_rig(store_config(redis_url, keep_pushed_revisions=1)) as running:
        yield running


@pytest.fixture
async def adapters(rig: tuple[RunningStore, StoreClient]) -> AsyncIterator[AsyncAdapters]:
    async with adapters_at(rig[0].grpc_port) as adapters:
        yield adapters


async def pushed(adapters: AsyncAdapters, *seeds: int) -> list[str]:
    return [(await adapters.push("a", *tensors_of(seed))).revision.digest for seed in seeds]


async def test_gateways_are_told_of_the_shares(adapters: AsyncAdapters, rig: tuple[RunningStore, StoreClient]) -> None:
    first, second = await pushed(adapters, 1, 2)

    adapter = await adapters.alias("a", "prod", {first[:12]: 95, second: 5})

    assert adapter.aliases["prod"] == first
    assert adapter.shares == {"prod": {first: 95, second: 5}}
    watch = rig[1].stub.WatchAliases(pb.WatchAliasesRequest())
    told = (await asyncio.wait_for(watch.read(), 10)).entries[0]
    watch.cancel()
    shares = {alias.label: {s.revision: s.weight for s in alias.shares} for alias in told.aliases}
    assert shares == {"latest": {}, "prod": {first: 95, second: 5}}


async def test_revisions_that_a_label_is_split_between_are_kept(adapters: AsyncAdapters) -> None:
    first, second = await pushed(adapters, 1, 2)
    await adapters.alias("a", "prod", {first: 95, second: 5})

    *_, last_but_one, last = await pushed(adapters, 3, 4, 5)

    # The label's two, the newest, and one without a label.
    assert {each.digest async for each in adapters.revisions("a")} == {first, second, last_but_one, last}


async def test_a_plain_revision_ends_a_split_and_a_rollback_brings_it_back(adapters: AsyncAdapters) -> None:
    first, second = await pushed(adapters, 1, 2)
    await adapters.alias("a", "prod", first)
    await adapters.alias("a", "prod", {first: 95, second: 5})
    assert (await adapters.alias("a", "prod", second)).shares == {}

    back = await adapters.roll_back("a", label="prod")

    assert (back.revision, back.adapter.shares) == (first, {"prod": {first: 95, second: 5}})
    newest = await anext(adapters.moves("a", label="prod"))
    assert (newest.cause, newest.shares) == ("rollback", {first: 95, second: 5})


async def test_shares_that_make_no_sense_are_refused(adapters: AsyncAdapters) -> None:
    first, second = await pushed(adapters, 1, 2)

    for shares, match in (
        ({first: 0, second: 5}, "weight 0 is not between 1 and 1000000"),
        ({first: 1_000_001, second: 5}, "weight 1000001 is not"),
        ({first: 1, first[:10]: 5}, "a revision comes twice"),
        (dict.fromkeys((f"{n:064x}" for n in range(17)), 1), "17 shares, at most 16"),
        ({}, "no shares"),
    ):
        with pytest.raises(InvalidParameterError, match=match):
            await adapters.alias("a", "prod", shares)
    with pytest.raises(AdapterNotFoundError, match="0000 does not exist in this store"):
        await adapters.alias("a", "prod", {first: 1, "0" * 64: 1})
    await adapters.alias("a", "prod", {first: 2, second: 1})
    with pytest.raises(ConflictError, match=f"points at {first}, not at {second}"):
        await adapters.alias("a", "prod", first, expected_revision=second)


async def test_records_without_a_split_are_as_older_replicas_read_them(adapters: AsyncAdapters, redis_url: str) -> None:
    first, second = await pushed(adapters, 1, 2)
    await adapters.alias("a", "prod", {first: 95, second: 5})
    await adapters.alias("a", "prod", second)

    valkey = connect(redis_url)
    record = json.loads(await valkey.hget(keys.adapter("a"), "record") or "")
    await valkey.aclose()

    assert "splits" not in record


async def test_the_command_line_pushes_splits_shows_and_rolls_back(
    rig: tuple[RunningStore, StoreClient],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runner = Runner(f"127.0.0.1:{rig[0].grpc_port}", monkeypatch, capsys)
    one, two = (write_adapter(tmp_path / str(n), tiny_base_dir(), Recipe(seed=n)) for n in (1, 2))

    def loraplex(*arguments: str) -> Result:
        """Run a command; the store's log, which this process prints too, is left out."""
        result = runner(*arguments)
        lines = [line for line in result.out.splitlines() if not re.search(r"\[(info|warning) ", line)]
        return replace(result, out="\n".join(lines))

    def all_calls() -> None:
        first = loraplex("adapters", "push", "a", str(one), "--label", "prod")
        assert first.out.startswith("pushed a@"), first
        old = loraplex("adapters", "labels", "a").out.split()[4]
        assert loraplex("adapters", "push", "a", str(two), "--expect", "").code != 0
        assert loraplex("adapters", "push", "a", str(two), "--expect", old).code == 0
        split = loraplex("adapters", "alias", "a", "prod", "--split", "latest=5", "--split", f"{old[:8]}=95")
        assert f"{old} 95" in split.out
        labels = loraplex("adapters", "labels", "a").out
        assert "95.0%" in labels
        assert "5.0%" in labels
        assert loraplex("adapters", "alias", "a", "prod", "--split", "latest").code == 2
        assert loraplex("adapters", "rollback", "a").out.endswith(f"-> {old[:12]}")
        history = [line.split()[2:4] for line in loraplex("adapters", "history", "a").out.splitlines()[1:]]
        assert history == [
            ["latest", "rollback"],
            ["prod", "alias"],
            ["latest", "push"],
            ["prod", "push"],
            ["latest", "push"],
        ]
        (one / "chat_template.jinja").write_text("{{ messages }}")
        refused = loraplex("adapters", "push", "a", str(one))
        assert "chat_template.jinja: a push carries tensors alone" in refused.err

    await asyncio.to_thread(all_calls)
