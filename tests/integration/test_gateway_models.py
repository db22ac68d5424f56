"""GET /v1/models: everything that `model` may name, for each caller what it may use, kept current by changes."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from loraplex_common.alias_feed import AdapterEntry
from loraplex_common.auth import ANYBODY
from loraplex_gateway.openai.model_list import _Rendered
from support.gateway_rig import DIGEST, MODEL_NAME, OTHER_DIGEST, Rig, running_gateway
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration
KEYS = "key-me me\nkey-vip vip\nkey-ops ops admin\n"
POET = ["poet", "poet:prod"]


@pytest.fixture
async def rig(valkey_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    async with running_gateway(valkey_url, api_keys_file=keys) as rig:
        yield rig


async def listed(rig: Rig, caller: str = "me", **query: Any) -> dict[str, Any]:
    async with httpx.AsyncClient(
        base_url=rig.http, headers={"authorization": f"Bearer key-{caller}"}, timeout=60
    ) as http:
        answer = await http.get("/v1/models", params=query)
    body: dict[str, Any] = answer.json()
    return body


def ids(body: dict[str, Any]) -> list[str]:
    return [entry["id"] for entry in body["data"]]


def entry(rig: Rig, name: str, labels: tuple[str, ...] = ("latest",), *, allowed: str = "") -> AdapterEntry:
    fingerprint = rig.app.catalog.models[0].fingerprint
    return AdapterEntry(
        name=name,
        labels=dict.fromkeys(labels, DIGEST),
        base_fingerprints={DIGEST: fingerprint},
        allowed_tenants=frozenset(allowed.split()),
    )


async def test_each_caller_sees_bases_names_and_labels_that_it_may_use(rig: Rig) -> None:
    rig.app.names.update([entry(rig, "staged", ("canary",)), entry(rig, "poet-2", allowed="me vip")])

    me, vip, ops = [await listed(rig, caller) for caller in ("me", "vip", "ops")]

    assert ids(me) == [MODEL_NAME, *POET, "poet-2", "staged:canary"]
    assert ids(vip) == ids(ops) == [MODEL_NAME, *POET, "poet-2", "secret", "staged:canary"]
    assert (me["has_more"], me["first_id"], me["last_id"]) == (False, MODEL_NAME, "staged:canary")
    prod = next(card for card in me["data"] if card["id"] == "poet:prod")
    assert (prod["root"], prod["parent"]) == (OTHER_DIGEST, MODEL_NAME)


async def test_what_is_listed_is_what_can_be_asked_for(rig: Rig) -> None:
    rig.app.names.update([entry(rig, MODEL_NAME), entry(rig, "staged", ("canary",))])
    async with openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key="key-me", max_retries=0) as client:
        cards = [card async for card in client.models.list() if card.id != MODEL_NAME]

        for card in cards:
            assert await client.models.retrieve(card.id) == card
            answer = await client.completions.create(model=card.id, prompt="x", max_tokens=1)
            assert answer.system_fingerprint == card.to_dict()["root"]
        assert f"{MODEL_NAME}:latest" in {card.id for card in cards}


async def test_a_change_is_seen_by_the_next_call(rig: Rig) -> None:
    before = ids(await listed(rig))
    rig.app.names.update([entry(rig, "newcomer"), AdapterEntry(name="poet", is_deleted=True)])

    assert ids(await listed(rig)) == [name for name in [*before, "newcomer"] if name not in POET] != before


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("cursor", ["after", "after_id"])
async def test_pages_together_are_the_whole_list(rig: Rig, limit: int, cursor: str) -> None:
    rig.app.names.update(
        [entry(rig, f"many-{n}", ("latest", "a", "b"), allowed="vip" if n % 3 else "") for n in range(9)]
    )
    whole, seen, query = ids(await listed(rig, "vip")), list[str](), dict[str, Any]()

    for _ in range(100):
        page = await listed(rig, "vip", limit=limit, **query)
        assert (page["first_id"], page["last_id"]) == (ids(page)[0], ids(page)[-1])
        seen += ids(page)
        query = {cursor: page["last_id"]}
        if not page["has_more"]:
            break

    assert seen == whole


async def test_a_page_goes_on_behind_an_entry_that_is_gone(rig: Rig) -> None:
    rig.app.names.update([AdapterEntry(name="poet", is_deleted=True), entry(rig, "poetess")])

    assert ids(await listed(rig, after="poet:prod")) == ["poetess"]


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "0"},
        {"limit": "1001"},
        {"limit": "0000010009999"},
        {"limit": ["1", "2"]},
        {"limit": "x"},
        {"before_id": "poet"},
        {"after": "poet", "after_id": "a"},
    ],
)
async def test_a_page_that_cannot_be_given_is_refused_by_name(rig: Rig, query: dict[str, Any]) -> None:
    body = await listed(rig, **query)

    assert body["error"]["param"] == next(iter(query))


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("poet", DIGEST),
        ("poet:prod", OTHER_DIGEST),
        (f"poet@{OTHER_DIGEST[:8]}", OTHER_DIGEST),
        (f"{MODEL_NAME}|poet:prod", OTHER_DIGEST),
        (MODEL_NAME, MODEL_NAME),
    ],
)
async def test_any_name_can_be_looked_up_and_generates(rig: Rig, name: str, root: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key="key-me", max_retries=0) as client:
        card = await client.models.retrieve(name)
        chat = await client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "x"}], max_tokens=1
        )

        assert (card.id, getattr(card, "root", "")) == (name, root)
        assert chat.system_fingerprint == (None if root == MODEL_NAME else root)
        assert chat.model == name


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        (
            f"{MODEL_NAME}|stranger",
            422,
            f"adapter 'stranger' was made for fingerprint 000000000000, not for {MODEL_NAME}",
        ),
        ("other|poet", 404, "no base model 'other' is served here"),
        (f"{MODEL_NAME}|nobody", 404, "no adapter is named 'nobody'"),
        (f"{MODEL_NAME}|secret", 404, "no adapter is named 'secret'"),
        (f"{MODEL_NAME}|", 400, "write base|adapter"),
        ("|poet", 400, "write base|adapter"),
        (f"{MODEL_NAME}|poet|poet", 400, "is no adapter name"),
    ],
)
async def test_a_pair_that_does_not_fit_is_refused_by_name(rig: Rig, name: str, status: int, says: str) -> None:
    async with httpx.AsyncClient(base_url=rig.http, headers={"authorization": "Bearer key-me"}) as http:
        completion = await http.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1})
        card = await http.get(f"/v1/models/{name}")

    # In a body it is a wrong value; behind a path it is a thing that there is not.
    assert (completion.status_code, card.status_code) == (status, 404 if status == 400 else status)
    for answer in (completion, card):
        assert says in answer.json()["error"]["message"]


async def test_a_hundred_thousand_names_are_kept_ready_and_a_change_costs_one_block(rig: Rig) -> None:
    names = [f"team-{n % 977}/adapter-{n:06}" for n in range(100_000)]
    rig.app.names.replace_all(entry(rig, name, allowed="vip" if n % 20 == 0 else "") for n, name in enumerate(names))
    began = time.process_time()
    await rig.app._models.pieces(ANYBODY)
    whole_cpu_s = time.process_time() - began
    whole = await listed(rig, "ops")
    pieces = {block: block.memo[_Rendered] for block in rig.app.names.blocks()}

    rig.app.names.update([entry(rig, names[5], ("latest", "prod"))])
    began = time.process_time()
    rig.app._listing.page(ANYBODY, page_size=100, page_token="")
    page = await rig.app._models.pieces(ANYBODY)
    num_entries = sum(len(piece.entries) for piece in page)
    cpu_s = time.process_time() - began

    assert ids(whole) == [MODEL_NAME, *sorted(names)]
    assert num_entries == 1 + 95_000 + 1
    changed = [block for block in rig.app.names.blocks() if pieces.get(block) is not block.memo[_Rendered]]
    assert len(changed) == 1
    assert cpu_s < whole_cpu_s / 4, "one block of many is made anew"


async def test_a_client_that_does_not_read_a_long_list_is_given_up_and_holds_up_no_other(valkey_url: str) -> None:
    async with running_gateway(valkey_url, slow_client_s=0.5) as rig:
        rig.app.names.replace_all(entry(rig, f"adapter-{n:06}") for n in range(60_000))
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.app.http_port, limit=1024)
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")

        assert len((await listed(rig, limit=5))["data"]) == 5
        await eventually(lambda: not any("run_asgi" in repr(task.get_coro()) for task in asyncio.all_tasks()))

        writer.close()
        with suppress(ConnectionError):
            assert not (await reader.read()).endswith(b"0\r\n\r\n")
