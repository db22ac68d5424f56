"""/v1/load_lora_adapter and /v1/unload_lora_adapter: an administrator's imports, over a real store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import adapter_pb2, adapter_store_pb2
from loraplex_common.ids import new_request_id
from support.admin_rig import COMMIT, AdminRig, running
from support.store_rig import other_base_dir, tiny_base_dir
from support.valkey import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration
ADDED, REMOVED = (
    "Success: LoRA adapter 'json' added successfully.",
    "Success: LoRA adapter 'json' removed successfully.",
)
LOADED = (
    "The lora adapter 'json' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to "
    "True."
)


@pytest.fixture
async def rig(store_valkey: EmbeddedValkey, tmp_path: Path) -> AsyncIterator[AdminRig]:
    async with running(fresh_database(store_valkey), tmp_path) as rig:
        yield rig


async def test_a_loaded_adapter_is_listed_at_once_and_an_unloaded_one_no_more(rig: AdminRig) -> None:
    loaded = await rig.load(lora_path=rig.folder("a"))
    names = [card["id"] for card in (await rig.http.get("/v1/models")).json()["data"]]
    again = await rig.load(lora_path=rig.folder("b", seed=1))
    unloaded = await rig.unload(lora_int_id=7)
    unknown = await rig.unload()
    back = await rig.load(lora_path=str(rig.root / "a"))

    assert (loaded.status_code, loaded.text) == (200, ADDED)
    assert names == ["tiny", "json"]
    assert (again.status_code, again.json()["error"]["message"], again.json()["error"]["param"]) == (
        400,
        LOADED,
        "lora_name",
    )
    assert (unloaded.status_code, unloaded.text) == (200, REMOVED)
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (
        404,
        "The lora adapter 'json' cannot be found.",
    )
    assert back.text == ADDED


async def test_in_place_is_a_new_revision_and_a_moved_label(rig: AdminRig) -> None:
    await rig.load(lora_path=rig.folder("a"))
    before = await rig.root_of("json")

    loaded = await rig.load(lora_path=rig.folder("b", seed=1), load_inplace=True)

    after = await rig.root_of("json")
    assert loaded.text == ADDED
    assert after == (await rig.store.get("json")).adapter.latest.revision != before
    assert await rig.root_of(f"json@{before}") == before


@pytest.mark.parametrize("path", ["org/adapter", "hf:org/adapter", f"hf:org/adapter@{COMMIT}"])
async def test_an_adapter_comes_from_the_hub_at_a_commit(rig: AdminRig, path: str) -> None:
    assert (await rig.load(lora_path=path)).text == ADDED

    assert (await rig.store.get("json")).adapter.latest.source == f"hf:org/adapter@{COMMIT}"


async def test_of_calls_that_load_one_new_name_at_once_one_wins_whatever_gateway_they_come_through(
    rig: AdminRig,
) -> None:
    folders = [rig.folder(f"f{seed}", seed=seed) for seed in range(10)]
    async with rig.another_gateway() as other:
        clients = [rig.http, other] * 5
        answers = await asyncio.gather(
            *[rig.load(lora_path=path, over=http) for path, http in zip(folders, clients, strict=True)]
        )

    won = [answer.text for answer in answers if answer.status_code == 200]
    lost = [answer.json()["error"]["message"] for answer in answers if answer.status_code == 400]
    assert (won, lost) == ([ADDED], [LOADED] * 9)
    kept = (await rig.store.get("json")).adapter
    winner = [answer.status_code for answer in answers].index(200)
    assert kept.latest.source.endswith(f"dir:f{winner}")
    assert [alias.label for alias in kept.aliases] == ["latest"]
    stored = await rig.store.stub.ListAdapterRevisions(adapter_store_pb2.ListAdapterRevisionsRequest(name="json"))
    assert len(stored.revisions) == 1


async def test_every_gateway_says_the_same_of_when_a_model_was_created(rig: AdminRig) -> None:
    await rig.load(lora_path=rig.folder("a"))
    imported_at = (await rig.store.get("json")).adapter.latest.create_time.seconds
    written_at = int((tiny_base_dir() / "config.json").stat().st_mtime)

    async with rig.another_gateway() as other:
        for http in (rig.http, other):
            listed = (await http.get("/v1/models")).json()["data"]
            asked = [(await http.get(f"/v1/models/{name}")).json() for name in ("tiny", "json", "json:latest")]
            assert [card["created"] for card in listed] == [written_at, imported_at]
            assert [card["created"] for card in asked] == [written_at, imported_at, imported_at]


async def test_a_load_that_fails_takes_no_name_from_another_that_goes_on(rig: AdminRig) -> None:
    for n in range(5):
        good, bad = f"json{n}", str(rig.root / "nothing")
        answers = await asyncio.gather(
            rig.load(good, lora_path=bad), rig.load(good, lora_path=rig.folder(f"f{n}")), rig.load(good, lora_path=bad)
        )
        assert answers[1].status_code == 200
        assert (await rig.store.get(good)).adapter.state == adapter_pb2.Adapter.STATE_READY


async def test_a_load_that_fails_leaves_a_name_that_was_there(rig: AdminRig) -> None:
    made = adapter_pb2.Adapter(name="json", description="mine", allowed_tenants=["me"])
    await rig.store.stub.CreateAdapter(adapter_store_pb2.CreateAdapterRequest(adapter=made))

    failed = await rig.load(lora_path=str(rig.root / "nothing"))
    loaded = await rig.load(lora_path=rig.folder("a"))

    kept = (await rig.store.get("json")).adapter
    assert (failed.status_code, loaded.status_code) == (400, 200)
    assert (kept.description, list(kept.allowed_tenants)) == ("mine", ["me"])


async def test_a_repeated_call_with_its_key_is_done_once(rig: AdminRig) -> None:
    folder, key = rig.folder("a"), new_request_id()

    both = await asyncio.gather(rig.load(lora_path=folder, key=key), rig.load(lora_path=folder, key=key))
    later = await rig.load(lora_path=folder, key=key)
    other = await rig.load(lora_path=rig.folder("b", seed=1), key=key)

    assert {answer.text for answer in (*both, later)} == {ADDED}
    assert (other.status_code, other.json()["error"]["param"]) == (400, "idempotency-key")
    assert (await rig.store.get("json")).adapter.latest.source.endswith("dir:a")


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"lora_path": "/etc"}, 400, "lora_path", "is not below an import root"),
        ({"lora_path": "ROOT/../../etc"}, 400, "lora_path", "is not below an import root"),
        ({"lora_path": "ROOT/nothing"}, 400, "lora_path", "cannot be read"),
        ({"lora_path": "./here"}, 400, "lora_path", "absolute path"),
        ({"lora_path": "hf:org/adapter@v1"}, 400, "lora_path", "no commit"),
        ({"lora_path": "org/other"}, 404, None, "no such repository"),
        ({"lora_path": "ROOT/a", "lora_name": "a b"}, 400, "lora_name", "is no adapter name"),
        ({"lora_path": "ROOT/a", "lora_name": "json:prod"}, 400, "lora_name", "is no adapter name"),
        ({"lora_path": "ROOT/a", "lora_name": "tiny"}, 400, "lora_name", "tiny"),
        ({"lora_path": "ROOT/a", "base_model_name": "other"}, 404, None, "base model 'other' is not known"),
        ({"lora_path": "ROOT/a", "is_3d_lora_weight": True}, 400, "is_3d_lora_weight", "not supported"),
        ({"lora_path": "ROOT/strange"}, 422, None, "tiny"),
        ({}, 400, "lora_path", "missing"),
    ],
)
async def test_what_cannot_be_loaded_is_refused_by_name_and_leaves_no_name(
    rig: AdminRig, body: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    rig.folder("a")
    rig.folder("strange", base=other_base_dir())
    asked = {key: value.replace("ROOT", str(rig.root)) if key == "lora_path" else value for key, value in body.items()}

    answer = await rig.load(asked.pop("lora_name", "json"), **asked)

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert says in error["message"]
    assert await rig.store.names() == []


async def test_the_store_asks_for_the_right_again_and_the_gateway_has_none(
    store_valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    async with running(fresh_database(store_valkey), tmp_path, api_keys_file=None) as rig:
        del rig.http.headers["authorization"]
        answer = await rig.load(lora_path=rig.folder("a"))

        assert answer.status_code == 403
        assert "the request came without one" in answer.json()["error"]["message"]
        assert await rig.store.names() == []


async def test_a_web_page_cannot_have_its_readers_browser_load_an_adapter(
    store_valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    async with running(fresh_database(store_valkey), tmp_path, keys="") as rig:
        body = b'{"lora_name": "json", "lora_path": "org/adapter"}'
        simple = await rig.http.post("/v1/load_lora_adapter", content=body, headers={"content-type": "text/plain"})
        real = await rig.load(lora_path="org/adapter")

        assert (simple.status_code, simple.json()["error"]["param"]) == (400, "content-type")
        assert real.text == ADDED


async def test_a_gateway_without_keys_changes_adapters_for_its_own_machine_alone(
    store_valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    async with running(fresh_database(store_valkey), tmp_path, keys="", host="0.0.0.0") as rig:
        answers = [await rig.load(lora_path="org/adapter"), await rig.unload()]

        assert {answer.status_code for answer in answers} == {403}
        assert all("--api-keys-file" in answer.json()["error"]["message"] for answer in answers)
