"""The page's maps of pools so large that a page of them is a few pixels."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import engine_pb2
from playwright.async_api import expect
from support.browser import opened, running_browser
from support.gateway_rig import DIGEST, running_gateway
from support.pool_double import PoolDouble, telling

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser, Page

pytestmark = [pytest.mark.integration, pytest.mark.slow]
NUM_PAGES = 10_000
COUNTING = """
window.drawn = { fill: 0, putImageData: 0 };
for (const name of Object.keys(drawn)) {
  const real = CanvasRenderingContext2D.prototype[name];
  CanvasRenderingContext2D.prototype[name] = function (...given) { drawn[name] += 1; return real.apply(this, given); };
}
"""
# A page's colour as the canvas has it, and that of the gap below it.
PIXELS = """([index, side, pages]) => {
  const canvas = document.querySelectorAll('article.engine canvas')[index];
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const columns = Math.floor(canvas.clientWidth / side);
  return pages.map((page) => {
    const [x, y] = [(page % columns) * side, Math.floor(page / columns) * side];
    return [...copy.getImageData(x, y, 1, 1).data, copy.getImageData(x, y + side - 1, 1, 1).data[3]];
  });
}"""
SETTLED = (
    "() => new Promise((resolve) => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(resolve)), 600))"
)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with running_browser() as browser:
        yield browser


@asynccontextmanager
async def shown(
    browser: Browser, valkey_url: str, pools: list[PoolDouble], **options: Any
) -> AsyncIterator[tuple[Page, list[str]]]:
    """Yield the page over a gateway with an engine for each pool; what it draws is counted."""
    async with (
        running_gateway(valkey_url, num_engines=len(pools), ui=True) as rig,
        telling(rig, pools),
        opened(browser, "about:blank", **options) as (page, complaints),
    ):
        await page.add_init_script(COUNTING)
        await page.goto(f"{rig.http}/ui")
        await expect(page.locator("article.engine")).to_have_count(len(pools))
        await expect(page.locator("#figure-used")).not_to_have_text("")
        await page.evaluate(SETTLED)
        yield page, complaints


class Quiet(PoolDouble):
    """A pool that is told of once, and again when it has changed."""

    def __init__(self) -> None:
        super().__init__(NUM_PAGES)
        self._told = engine_pb2.PoolChange()

    def change(self) -> engine_pb2.PoolChange:
        now = super().change()
        if now == self._told:
            return engine_pb2.PoolChange()
        self._told = now
        return now


def pool() -> PoolDouble:
    made = Quiet()
    made.hold(DIGEST)  # page 0
    made.open("r-1")  # page 1
    return made


async def test_each_page_has_its_owners_colour_and_a_gap_beside_it(browser: Browser, valkey_url: str) -> None:
    async with shown(browser, valkey_url, [pool()]) as (page, complaints):
        side = await page.evaluate(
            """() => { const { clientWidth: width, clientHeight: height } = document.querySelector('article.engine canvas');
            for (let side = 26; side >= 3; side -= 1)
              if (Math.ceil(10000 / Math.floor(width / side)) * side === height) return side; }"""
        )
        adapter, kv, free = await page.evaluate(PIXELS, [0, side, [0, 1, NUM_PAGES - 1]])
        colors = await page.evaluate(
            """() => { const style = getComputedStyle(document.documentElement);
            return ['--adapter-0', '--kv-2', '--free'].map((name) => style.getPropertyValue(name).trim()); }"""
        )

    shown_colors = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue, _, _ in (adapter, kv, free)]
    assert shown_colors == colors
    assert [pixel[3:] for pixel in (adapter, kv, free)] == [[255, 0]] * 3
    assert complaints == []


async def test_the_colours_follow_the_readers_wish_while_nothing_else_changes(
    browser: Browser, valkey_url: str
) -> None:
    seen = []
    async with shown(browser, valkey_url, [pool()]) as (page, _):
        for scheme in ("light", "dark", "light"):
            await page.emulate_media(color_scheme=scheme)
            await page.evaluate(SETTLED)
            seen.append(await page.evaluate(PIXELS, [0, 3, [0]]))

    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("ratio", [0.5, 1.25, 2.0])
async def test_all_pages_are_drawn_at_any_size_of_a_pixel(browser: Browser, valkey_url: str, ratio: float) -> None:
    async with shown(browser, valkey_url, [pool()], device_scale_factor=ratio) as (page, complaints):
        rows = await page.evaluate(
            """() => { const { canvas } = document.querySelector('article.engine canvas').getContext('2d');
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
            copy.drawImage(canvas, 0, 0);
            const { data, width, height } = copy.getImageData(0, 0, canvas.width, canvas.height);
            const filled = (row) => { for (let x = 3; x < 4 * width; x += 4) if (data[4 * row * width + x]) return true; return false; };
            return [...Array(height).keys()].filter(filled).length / height; }"""
        )

    assert 0.4 < rows <= 1
    assert complaints == []


async def test_no_page_of_very_many_takes_a_path_of_its_own(browser: Browser, valkey_url: str) -> None:
    """Twenty engines with so many pages each took a third of a second for a frame."""
    async with shown(browser, valkey_url, [pool() for _ in range(3)]) as (page, _):
        box = await page.locator("article.engine canvas").first.bounding_box()
        assert box is not None
        for step in range(5):
            await page.mouse.move(box["x"] + 2 + step, box["y"] + 2)
            await page.evaluate(SETTLED)
        drawn = await page.evaluate("drawn")

    assert drawn["putImageData"] >= 3
    assert drawn["fill"] == 0


async def test_a_map_is_drawn_again_only_where_it_would_look_otherwise(browser: Browser, valkey_url: str) -> None:
    quiet = [pool() for _ in range(3)]
    async with shown(browser, valkey_url, quiet) as (page, _):
        box = await page.locator("article.engine canvas").first.bounding_box()
        assert box is not None
        await page.mouse.move(
            box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        )  # a free page: nothing stands out
        await page.evaluate(SETTLED)
        before = await page.evaluate("drawn.putImageData")
        for step in range(20):
            await page.mouse.move(box["x"] + box["width"] / 2 + step, box["y"] + box["height"] / 2)
        await page.evaluate(SETTLED)
        still = await page.evaluate("drawn.putImageData")
        quiet[1].hold("cd" * 32)
        await expect(page.locator("#figure-adapters")).to_have_text("2")
        await page.evaluate(SETTLED)
        changed = await page.evaluate("drawn.putImageData")

    assert still == before
    assert changed > still
