"""The page at /ui in a headless Chromium, over a real stack with two adapters."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import expect
from support.browser import opened, running_browser
from support.stack import Stack, StackFlags, running_stack
from support.stack_fixtures import import_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from playwright.async_api import Browser, Page

pytestmark = [pytest.mark.integration, pytest.mark.slow]
KEYS = "key-me me\nkey-ops ops admin\nkey-scraper prometheus metrics\n"


@pytest.fixture(scope="module")
def stack(tiny_world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("ui"), *tiny_world, StackFlags(gateway=("--ui",))) as stack:
        import_all(stack)
        yield stack


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with running_browser() as browser:
        yield browser


def address(gateway: Any) -> str:
    return f"http://{gateway.addresses['http']}/ui"


@asynccontextmanager
async def busy(stack: Stack) -> AsyncIterator[None]:
    """Have requests of an adapter run, one after another, during the block."""

    async def ask() -> None:
        while True:
            async for _ in client.generate(
                prompt_token_ids=[5, 6, 7], adapter="tiny-a", max_new_tokens=480, ignore_eos=True
            ):
                pass

    async with stack.client() as client:
        asking = asyncio.create_task(ask())
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


async def chosen(page: Page, *names: str) -> None:
    """Have exactly these adapters answer, by the keyboard alone."""
    await expect(page.locator("#chosen li")).not_to_have_count(0)
    for _ in range(await page.locator("#chosen .remove").count()):
        await page.locator("#chosen .remove").first.press("Enter")
    await page.focus("#adapter")
    for name in names:
        await page.keyboard.type(name)
        await page.keyboard.press("Enter")
    await expect(page.locator("#chosen li")).to_have_text([re.compile(name) for name in names])


async def test_the_map_shows_the_pages_of_a_running_request_and_nothing_complains(
    stack: Stack, browser: Browser
) -> None:
    async with opened(browser, address(stack.gateway)) as (page, complaints), busy(stack):
        await expect(page.locator("#status")).to_have_text("Live")
        await expect(page.locator("#adapters tbody")).to_contain_text("tiny-a")
        request = page.locator("#requests tbody tr:not([hidden])", has_text="tiny-a").first
        detail = page.locator("#detail")
        async with asyncio.timeout(30):
            while "KV cache of request" not in await detail.inner_text():  # a request may end before the click
                await request.locator("button").click()
        text = await detail.inner_text()

    assert re.search(r"KV cache of request \S+, tiny-a, (prefill|decode), \d+ pages", text)
    assert complaints == []


async def test_the_playground_streams_two_adapters_answers_side_by_side_by_keyboard_alone(
    stack: Stack, browser: Browser
) -> None:
    async with opened(browser, address(stack.gateway)) as (page, complaints):
        await page.select_option("#mode", "text")
        await chosen(page, "tiny-a", "tiny-b")
        await page.focus("#prompt")
        await page.keyboard.press("Control+Enter")
        for index in (0, 1):
            await expect(page.locator(".answer").nth(index)).to_have_attribute("data-state", "done")
        answers = await page.locator(".answer pre").all_inner_texts()
        facts = await page.locator(".answer .facts").all_inner_texts()

    assert len(answers) == 2
    assert all(answers)
    assert answers[0] != answers[1]
    assert all(re.match(r"\d+ tokens", each) for each in facts), facts
    assert complaints == []


async def test_every_control_is_reached_by_tab_and_arrows_move_over_a_map(stack: Stack, browser: Browser) -> None:
    async with opened(browser, address(stack.gateway)) as (page, _):
        await expect(page.locator("canvas")).to_have_count(1)
        reached = set()
        for _ in range(60):
            await page.keyboard.press("Tab")
            reached.add(
                await page.evaluate("document.activeElement.id || document.activeElement.tagName.toLowerCase()")
            )
        await page.focus("canvas")
        outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        for pressed in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft"):
            await page.keyboard.press(pressed)
        text = await page.locator("#detail").inner_text()
        name = await page.locator("canvas").get_attribute("aria-label")

    assert {
        "key-button",
        "canvas",
        "adapter-filter",
        "prompt",
        "adapter",
        "add",
        "mode",
        "run",
        "import-name",
    } <= reached
    assert outline != "none"
    assert text.startswith("Page 1:")
    assert name is not None
    assert "free" in name


async def test_it_is_dark_where_the_reader_wants_that(stack: Stack, browser: Browser) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        async with opened(browser, address(stack.gateway), color_scheme=scheme) as (page, _):
            shades[scheme] = await page.evaluate("getComputedStyle(document.body).backgroundColor")

    brightness = {scheme: sum(map(int, re.findall(r"\d+", shade)[:3])) for scheme, shade in shades.items()}
    assert brightness["dark"] < 150 < 600 < brightness["light"]


async def test_a_key_is_asked_for_and_shows_what_it_may_see(stack: Stack, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEYS)
    stack.flags = StackFlags(gateway=("--ui", "--api-keys-file", str(tmp_path / "keys")))
    gateway = stack.start_gateway()
    try:
        async with opened(browser, address(gateway)) as (page, _):
            await expect(page.locator("#key-dialog")).to_be_visible()
            await page.fill("#key", "key-guess")
            await page.keyboard.press("Enter")
            await expect(page.locator("#key-reason")).to_contain_text("The gateway refused this key")
            await page.fill("#key", "key-ops")
            await page.keyboard.press("Enter")
            await expect(page.locator("#status")).to_have_text("Live")
            await expect(page.locator("canvas")).to_have_count(1)
            cookies = await page.context.cookies()
        async with opened(browser, address(gateway), key="key-me") as (page, _):
            await expect(page.locator("#notice")).to_contain_text("it takes the role admin")
            await expect(page.locator("#chosen li")).not_to_have_count(0)  # a tenant has the playground
            assert await page.locator("canvas").count() == 0
        async with opened(browser, address(gateway), key="key-scraper") as (page, _):
            await expect(page.locator("#notice")).to_contain_text("it takes the role admin")
            await expect(page.locator("#adapter")).to_have_attribute("placeholder", re.compile("may not call"))
    finally:
        stack.flags = StackFlags(gateway=("--ui",))
        assert gateway.stop() == 0

    assert cookies == []


async def test_a_page_outlives_a_restart_of_its_gateway(stack: Stack, browser: Browser) -> None:
    gateway = stack.start_gateway()
    async with opened(browser, address(gateway)) as (page, _):
        await expect(page.locator("canvas")).to_have_count(1)
        before = gateway.addresses
        gateway.kill()
        await expect(page.locator("#status")).to_have_text("Reconnecting")
        ports = ("--http-port", before["http"].rpartition(":")[2])
        again = await asyncio.to_thread(stack.start_gateway, *ports)
        try:
            await expect(page.locator("#status")).to_have_text("Live")
            await expect(page.locator("canvas")).to_have_count(1)
        finally:
            assert again.stop() == 0
