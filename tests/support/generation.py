"""Greedy generation through a gateway, and a neighbour whose tokens show whether anything disturbed it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from loraplex_client import AsyncClient, AsyncGenerateStream

PROMPT = (10, 20, 30, 40, 50)
TIMEOUT_S = 60.0


def start(client: AsyncClient, adapter: str | None, max_new_tokens: int = 16, **options: Any) -> AsyncGenerateStream:
    """Start a greedy generation that runs to its length; ``options`` replace the defaults."""
    defaults: dict[str, Any] = {
        "prompt_token_ids": PROMPT,
        "adapter": adapter,
        "temperature": 0.0,
        "max_new_tokens": max_new_tokens,
        "ignore_eos": True,
        "timeout": TIMEOUT_S,
    }
    if options.keys() & {"prompt", "messages"}:
        del defaults["prompt_token_ids"]
    return client.generate(**(defaults | options))


async def read_tokens(stream: AsyncGenerateStream) -> list[int]:
    """Read a stream to its end and return its tokens."""
    return [token_id async for event in stream for token_id in event.token_ids]


async def greedy(client: AsyncClient, adapter: str | None, max_new_tokens: int = 16, **options: Any) -> list[int]:
    """Return the tokens of a greedy generation."""
    return await read_tokens(start(client, adapter, max_new_tokens, **options))


async def greedy_all(client: AsyncClient, adapters: Sequence[str | None], max_new_tokens: int = 16) -> list[list[int]]:
    """Return the tokens of one generation per adapter, all submitted at once."""
    return await asyncio.gather(*(greedy(client, adapter, max_new_tokens) for adapter in adapters))


class Neighbour:
    """A generation whose tokens are known, run again and again beside others."""

    def __init__(self, adapter: str | None, max_new_tokens: int = 60) -> None:
        self._adapter = adapter
        self._max_new_tokens = max_new_tokens
        self._alone: list[int] = []

    @asynccontextmanager
    async def undisturbed(self, client: AsyncClient) -> AsyncIterator[None]:
        """Run it beside the block, and check that it gives the same tokens as alone."""
        self._alone = self._alone or await greedy(client, self._adapter, self._max_new_tokens)
        beside = asyncio.create_task(greedy(client, self._adapter, self._max_new_tokens))
        try:
            yield
            assert await beside == self._alone
        finally:
            beside.cancel()
