"""The page at /ui against what a stranger does: text that looks like markup, keys taken away, many engines, fields left empty."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import engine_pb2
from loraplex_common.secret import Secret
from playwright.async_api import expect
from support.browser import opened, running_browser
from support.gateway_rig import DIGEST, Rig, running_gateway
from support.pool_double import PoolDouble, telling

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from playwright.async_api import Browser, Page

pytestmark = [pytest.mark.integration, pytest.mark.slow]
MARKUP = "<img src=x onerror=\"document.title='owned'\">'\"\u202e&amp;" + "\u00fc" * 200
KEYS = "key-me me\nkey-ops ops admin\nkey-gateway gateway-1 gateway\n"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with running_browser() as browser:
        yield browser


@asynccontextmanager
async def shown(
    browser: Browser, valkey_url: str, pools: list[PoolDouble], *, key: str = "", **overrides: Any
) -> AsyncIterator[tuple[Rig, Page, list[str]]]:
    """Yield a gateway with an engine for each pool, and the page over it."""
    async with (
        running_gateway(valkey_url, num_engines=len(pools), ui=True, **overrides) as rig,
        telling(rig, pools),
        opened(browser, f"{rig.http}/ui", key=key) as (page, complaints),
    ):
        await expect(page.locator("article.engine")).to_have_count(len(pools))
        yield rig, page, complaints


async def test_text_of_others_is_shown_as_text(browser: Browser, valkey_url: str) -> None:
    pool = PoolDouble()
    pool.hold(DIGEST)
    pool.open("r-1", whose=MARKUP, adapters=[DIGEST])
    pool.model = MARKUP
    async with shown(browser, valkey_url, [pool]) as (_, page, complaints):
        await expect(page.locator("article.engine .model")).to_contain_text(MARKUP[:40])
        hint = await page.locator("#requests tbody button").first.get_attribute("title")
        title = await page.title()
        images = await page.locator("main img").count()

    assert MARKUP in (hint or "")
    assert (title, images, complaints) == ("loraplex", 0, [])


async def test_what_a_key_showed_is_gone_once_the_key_is_taken_away(
    browser: Browser, valkey_url: str, tmp_path: Path
) -> None:
    pool = PoolDouble()
    pool.hold(DIGEST)
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    peer: dict[str, Any] = {"api_keys_file": keys, "peer_api_key": Secret("key-gateway")}
    async with shown(browser, valkey_url, [pool], key="key-ops", **peer) as (_, page, _):
        await expect(page.locator("#about")).to_contain_text("ops")
        keys.write_text(KEYS.replace("key-ops ops admin\n", ""))

        await expect(page.locator("#key-dialog")).to_be_visible()
        await expect(page.locator("article.engine")).to_have_count(0)
        await expect(page.locator("#adapters tbody tr:not([hidden])")).to_have_count(0)
        await expect(page.locator("#about")).to_have_text("")
        await expect(page.locator("#imports-panel")).to_be_hidden()


async def test_a_key_that_no_header_can_have_is_refused_by_name(
    browser: Browser, valkey_url: str, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    peer: dict[str, Any] = {"api_keys_file": keys, "peer_api_key": Secret("key-gateway")}
    async with (
        running_gateway(valkey_url, ui=True, **peer) as rig,
        opened(browser, f"{rig.http}/ui") as (page, _),
    ):
        await expect(page.locator("#key-dialog")).to_be_visible()
        await page.fill("#key", "schl\u00fcssel \u2603")
        await page.keyboard.press("Enter")

        await expect(page.locator("#key-reason")).to_contain_text("ASCII")
        await expect(page.locator("#key-dialog")).to_be_visible()


async def test_the_names_are_read_once_a_second_at_most_however_many_engines_come(
    browser: Browser, valkey_url: str
) -> None:
    lists: list[str] = []
    async with (
        running_gateway(valkey_url, num_engines=20, ui=True) as rig,
        telling(rig, [PoolDouble() for _ in range(20)]),
        opened(browser, "about:blank") as (page, complaints),
    ):
        page.on("request", lambda request: lists.append(request.url) if "/v1/models" in request.url else None)
        started_s = time.monotonic()
        await page.goto(f"{rig.http}/ui")
        await expect(page.locator("article.engine")).to_have_count(20)
        await expect(page.locator("#adapter")).to_have_attribute("placeholder", re.compile("names"))
        num_reads = len(lists)
        taken_s = time.monotonic() - started_s

    assert 1 <= num_reads <= 1 + taken_s, lists
    assert complaints == []


async def test_an_engine_that_goes_takes_its_pages_and_leaves_the_others_bright(
    browser: Browser, valkey_url: str
) -> None:
    pools = [PoolDouble(), PoolDouble()]
    for pool in pools:
        pool.hold(DIGEST)
    async with shown(browser, valkey_url, pools) as (rig, page, _):
        gone = f"127.0.0.1:{rig.engines[0].port}"
        await page.locator("article.engine", has_text=gone).locator("canvas").focus()
        await expect(page.locator("#detail")).to_contain_text("weights of adapter poet")
        await rig.engines[0].unregister(rig.valkey)
        await rig.engines[0].kill()

        await expect(page.locator("#detail")).to_contain_text("Point at a page")
        await expect(page.locator("article.engine", has_text=gone).locator(".map")).to_have_count(0)


async def test_the_description_of_a_page_follows_its_owner(browser: Browser, valkey_url: str) -> None:
    pool = PoolDouble()
    pool.hold(DIGEST)
    async with shown(browser, valkey_url, [pool]) as (_, page, _):
        await page.focus("canvas")
        await expect(page.locator("#detail")).to_contain_text("weights of adapter poet")
        pool.drop(DIGEST)

        await expect(page.locator("#detail")).to_have_text("Page 0: free")


async def test_adapters_and_requests_that_engines_only_count_are_counted(browser: Browser, valkey_url: str) -> None:
    pool = PoolDouble()
    pool.hold(DIGEST)
    pool.left_out = (40, 8000)
    async with shown(browser, valkey_url, [pool]) as (_, page, _):
        await expect(page.locator("#adapters-more")).to_have_text("and 8,000 that engines only count")
        await expect(page.locator("#requests-more")).to_contain_text("and 40 that engines only count")


async def test_fields_that_cannot_be_sent_are_named_and_nothing_is_asked(browser: Browser, valkey_url: str) -> None:
    asked: list[str] = []
    async with shown(browser, valkey_url, [PoolDouble()]) as (_, page, _):
        page.on("request", lambda request: asked.append(request.url) if "completions" in request.url else None)
        await expect(page.locator("#chosen li")).not_to_have_count(0)
        for field, value in (("max-tokens", ""), ("max-tokens", "0"), ("temperature", ""), ("prompt", "")):
            before = await page.input_value(f"#{field}")
            await page.fill(f"#{field}", value)
            await page.focus("#prompt")
            await page.keyboard.press("Control+Enter")
            assert await page.evaluate("document.activeElement.id") == field  # where the browser says what is wrong
            await page.fill(f"#{field}", before)
        for _ in range(await page.locator("#chosen .remove").count()):
            await page.locator("#chosen .remove").first.click()
        await page.focus("#prompt")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#note")).to_have_text("Choose an adapter first.")
        for n in range(9):
            await page.fill("#adapter", f"name-{n}")
            await page.press("#adapter", "Enter")
        await expect(page.locator("#note")).to_have_text("name-8 is left out: at most 8 answer.")

    assert asked == []


async def test_a_hidden_tab_lets_go_of_its_stream_and_comes_back(browser: Browser, valkey_url: str) -> None:
    async with shown(browser, valkey_url, [PoolDouble()]) as (rig, page, _):
        await page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        async with asyncio.timeout(30):
            while rig.app.fleet.num_watched:  # noqa: ASYNC110 -- nothing tells of the last reader's end
                await asyncio.sleep(0.02)
        await page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: false, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        await expect(page.locator("#status")).to_have_text("Live")


async def test_a_narrow_window_has_nothing_beyond_its_edge(browser: Browser, valkey_url: str) -> None:
    pool = PoolDouble()
    pool.hold(DIGEST)
    pool.open("r" * 100, whose="x" * 200, adapters=[DIGEST], phase=engine_pb2.PoolRequest.PHASE_DECODE)
    async with shown(browser, valkey_url, [pool]) as (_, page, _):
        for width in (320, 800):
            await page.set_viewport_size({"width": width, "height": 700})
            await expect(page.locator("#requests tbody tr")).to_have_count(1)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
