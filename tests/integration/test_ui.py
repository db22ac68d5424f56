"""The page at /ui and its events, as a client sees them that is no browser; tests/integration/test_ui_browser.py has one."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from loraplex_common.secret import Secret
from support.admin_rig import running as running_admin
from support.gateway_rig import Rig, running_gateway
from support.stack import StackFlags, running_stack
from support.stack_fixtures import import_all

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration
KEYS = "key-me me\nkey-ops ops admin\nkey-scraper prometheus metrics\nkey-gateway gateway-1 gateway\n"
TIMEOUT_S = 30.0


def as_(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer key-{name}"}


@pytest.fixture
async def rig(valkey_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    async with running_gateway(valkey_url, ui=True, api_keys_file=keys, peer_api_key=Secret("key-gateway")) as rig:
        yield rig


@asynccontextmanager
async def following(http: httpx.AsyncClient, **headers: str) -> AsyncIterator[AsyncGenerator[tuple[str, Any], None]]:
    """Yield a generator of the events' names and data."""

    async def told(response: httpx.Response) -> AsyncGenerator[tuple[str, Any], None]:
        name = ""
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))

    async with (
        asyncio.timeout(TIMEOUT_S),
        http.stream("GET", "/ui/events", headers=headers, timeout=TIMEOUT_S) as response,
    ):
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield told(response)


async def test_without_the_flag_there_is_no_page(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        answers = [await http.get(path) for path in ("/ui", "/ui/main.js", "/ui/events")]

    assert [answer.status_code for answer in answers] == [404, 404, 404]


async def test_the_page_and_its_files_show_nothing_and_allow_only_themselves(rig: Rig) -> None:
    async with httpx.AsyncClient(base_url=rig.http) as http:
        page = await http.get("/ui")
        files = {name: await http.get(f"/{name}") for name in re.findall(r'(?:href|src)="(ui/[^"]+)"', page.text)}
        again = await http.get("/ui", headers={"if-none-match": page.headers["etag"]})
        missing = [
            await http.get(path) for path in ("/ui/routes.py", "/ui/..%2froutes.py", "/ui/%2e%2e/%2e%2e/context.py")
        ]

    assert {"ui/main.js", "ui/style.css"} <= files.keys()
    for answer in (page, *files.values()):
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in answer.headers
    assert "tiny" not in page.text
    assert (again.status_code, again.content) == (304, b"")
    assert {answer.status_code for answer in missing} == {404}
    assert re.search(r"<script[^>]*>[^<]|\son\w+=|style=", page.text) is None, "inline script or style"
    assert re.search(r"https?://", page.text) is None, "the page asks another server"


async def test_events_ask_for_a_key_with_the_right_to_see_the_fleet(rig: Rig) -> None:
    async with httpx.AsyncClient(base_url=rig.http) as http:
        strangers = [await http.get("/ui/events", headers=each) for each in ({}, {"authorization": "Bearer guess"})]
        others = [await http.get("/ui/events", headers=as_(name)) for name in ("me", "scraper", "gateway")]
        by_address = await http.get("/ui/events?key=key-ops")
        async with following(http, **as_("ops")) as events:
            name, first = await anext(events)

    assert [answer.status_code for answer in strangers] == [401, 401]
    assert [answer.status_code for answer in others] == [403, 403, 403]
    assert "it takes the role admin" in others[0].json()["error"]["message"]
    assert by_address.status_code == 401
    assert (name, first["caller"], first["has_store"]) == ("gateway", "ops", True)
    assert "key-ops" not in json.dumps(first)


async def test_events_end_once_the_key_is_taken_away(rig: Rig, tmp_path: Path) -> None:
    async with httpx.AsyncClient(base_url=rig.http) as http, following(http, **as_("ops")) as events:
        await anext(events)
        (tmp_path / "keys").write_text(KEYS.replace("key-ops ops admin\n", ""))
        with suppress(httpx.RemoteProtocolError):  # the body is cut short
            async for _ in events:
                pass

    async with httpx.AsyncClient(base_url=rig.http) as http:
        assert (await http.get("/ui/events", headers=as_("ops"))).status_code == 401


async def test_a_reader_that_goes_leaves_no_watch_behind(rig: Rig) -> None:
    async with httpx.AsyncClient(base_url=rig.http) as http, following(http, **as_("ops")) as events:
        await anext(events)
    async with asyncio.timeout(TIMEOUT_S):
        while rig.app.fleet.num_watched:  # noqa: ASYNC110 -- nothing tells of the last reader's end
            await asyncio.sleep(0.02)


async def test_the_fleet_is_told_whole_once_and_then_by_what_changes(
    tiny_world: tuple[Path, Path], tmp_path: Path
) -> None:
    with running_stack(tmp_path, *tiny_world, StackFlags(gateway=("--ui",))) as stack:
        import_all(stack)
        http = httpx.AsyncClient(base_url=f"http://{stack.gateway.addresses['http']}")
        async with http, following(http) as events, stack.client() as client:
            stream = client.generate(prompt_token_ids=[5, 6, 7], adapter="tiny-a", max_new_tokens=200, ignore_eos=True)
            drained = asyncio.create_task(_drain(stream))
            told = [data async for name, data in _until_request(events) if name == "engine"]
            await drained
        (request,) = told[-1]["requests"]
        digests = {digest: name for each in told for digest, name in each["names"].items()}
        owners = {run[2] for each in told for run in _runs(each)}

    assert [each.get("snapshot", False) for each in told] == [True] + [False] * (len(told) - 1)
    assert told[0]["info"]["model"]
    assert [digests[digest] for digest in request["adapters"]] == ["tiny-a"]
    assert {1, 2} <= owners, "no page of KV, or none of an adapter, was told of"


async def test_imports_are_told_with_their_ends(valkey_url: str, tmp_path: Path) -> None:
    async with running_admin(valkey_url, tmp_path, ui=True) as rig:
        await rig.load("good", lora_path=rig.folder("good"))
        await rig.load("bad", lora_path=str(rig.root / "nothing"))
        async with following(rig.http) as events:
            data = await anext(data async for name, data in events if name == "imports")

    newest, oldest = data["imports"]
    assert data["error"] == ""
    assert (oldest["name"], oldest["stage"], oldest["error"]) == ("good", "done", "")
    assert (newest["name"], newest["stage"]) == ("bad", "done")
    assert newest["error"]
    assert newest["created_at"] >= oldest["created_at"] > 1e9


async def _until_request(events: AsyncGenerator[tuple[str, Any], None]) -> AsyncIterator[tuple[str, Any]]:
    """Yield events up to the first that tells of a request."""
    async for name, data in events:
        yield name, data
        if name == "engine" and data["requests"]:
            return


def _runs(told: dict[str, Any]) -> list[list[int]]:
    return [told["runs"][at : at + 4] for at in range(0, len(told["runs"]), 4)]


async def _drain(stream: Any) -> None:
    async for _ in stream:
        pass
