"""`loraplex adapters apply` brings a real store to what a file says, and a second time does nothing."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from support.adapters import Recipe, adapter_files, write_adapter
from support.cli_runner import Runner
from support.hub_double import HubDouble, running_hub
from support.pushes import adapters_at
from support.store_rig import running_rig, store_config, tiny_base_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from loraplex_client import AsyncAdapters

pytestmark = pytest.mark.integration
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Apply: TypeAlias = "Callable[..., Coroutine[Any, Any, list[str]]]"


@pytest.fixture
async def adapters_and_apply(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> AsyncIterator[tuple[AsyncAdapters, Apply]]:
    hub = HubDouble("org/poet", COMMIT, adapter_files(tiny_base_dir(), Recipe(seed=9)))
    with running_hub(hub):
        async with running_rig(store_config(redis_url, hf_endpoint=hub.url)) as (store, _):
            runner = Runner(f"127.0.0.1:{store.grpc_port}", monkeypatch, capsys)

            async def apply(text: str, *flags: str) -> list[str]:
                (tmp_path / "adapters.yaml").write_text(text)
                arguments = ("adapters", "apply", "-f", str(tmp_path / "adapters.yaml"), *flags)
                result = await asyncio.to_thread(runner, *arguments)
                assert result.code == 0, result.err
                return [line for line in result.out.splitlines() if not re.search(r"\[(info|warning) ", line)]

            async with adapters_at(store.grpc_port) as adapters:
                yield adapters, apply


async def test_a_file_is_applied_and_a_second_time_nothing_is_done(
    adapters_and_apply: tuple[AsyncAdapters, Apply], tmp_path: Path
) -> None:
    adapters, apply = adapters_and_apply
    write_adapter(tmp_path / "one", tiny_base_dir(), Recipe(seed=1))
    text = f"""
adapters:
  support: {{source: one, description: tickets, tenants: [a, b], labels: {{prod: latest}}}}
  org/poet: {{source: 'hf:org/poet@{COMMIT}'}}
"""
    first = await apply(text)
    assert [line.split(",")[0] for line in first if "->" not in line] == [
        "support: create",
        "org/poet: create",
        f"org/poet: import hf:org/poet@{COMMIT}",
    ]
    support = await adapters.get("support")
    assert (support.description, set(support.allowed_tenants)) == ("tickets", {"a", "b"})
    assert support.aliases["prod"] == support.aliases["latest"]
    assert await apply(text) == ["nothing to do"]
    assert (await adapters.get("support")).etag == (await adapters.get("support")).etag

    write_adapter(tmp_path / "one", tiny_base_dir(), Recipe(seed=2))
    old, changed = (
        support.aliases["prod"],
        text.replace("prod: latest", f"prod: {{'{support.aliases['prod'][:8]}': 95, latest: 5}}"),
    )
    await apply(changed.replace("tickets", "mails"))
    support = await adapters.get("support")
    assert support.description == "mails"
    assert support.shares == {"prod": {old: 95, support.aliases["latest"]: 5}}
    assert support.aliases["latest"] != old
    assert await apply(changed.replace("tickets", "mails")) == ["nothing to do"]


async def test_pruning_deletes_what_the_file_lacks_and_a_dry_run_only_says_so(
    adapters_and_apply: tuple[AsyncAdapters, Apply], tmp_path: Path
) -> None:
    adapters, apply = adapters_and_apply
    folder = write_adapter(tmp_path / "one", tiny_base_dir(), Recipe(seed=1))
    for name in ("kept", "extra"):
        await adapters.upload(name, folder, label="old")
    text = "adapters: {kept: {labels: {prod: latest}}, new: {source: one}}"

    said = await apply(text, "--prune", "--dry-run")

    assert [re.sub(r" (->|/).*", "", line) for line in said] == [
        "would: kept: label prod",
        "would: kept: remove label old",
        "would: new: create",
        "would: new: import",
        "would: extra: delete",
    ]
    assert [each.name async for each in adapters.list()] == ["extra", "kept"]
    assert (await adapters.get("kept")).aliases.keys() == {"latest", "old"}
    await apply(text, "--prune")
    assert [each.name async for each in adapters.list()] == ["kept", "new"]
    assert (await adapters.get("kept")).aliases.keys() == {"latest", "prod"}
    assert await apply(text, "--prune") == ["nothing to do"]
