"""A headless Chromium, the machine's own; `tests/tools/ensure-chromium.sh` provides it."""

from __future__ import annotations

import os
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import async_playwright, expect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser, Page

PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)


@asynccontextmanager
async def running_browser() -> AsyncIterator[Browser]:
    """Run a browser that ends with the block; skips where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium on this machine: run tests/tools/ensure-chromium.sh")
    unconfined = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no sandbox; the page is our own
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=program, args=[*unconfined, "--disable-dev-shm-usage"], timeout=PATIENCE_MS
        )
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def opened(browser: Browser, url: str, *, key: str = "", **options: Any) -> AsyncIterator[tuple[Page, list[str]]]:
    """Open an address in a session of its own; yield the tab, and what its console complains of, the CSP's violations included."""
    context = await browser.new_context(**options)
    complaints: list[str] = []
    try:
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if key:
            await page.add_init_script(f"sessionStorage.setItem('loraplex.key', '{key}')")
        await page.goto(url)
        yield page, complaints
    finally:
        await context.close()
