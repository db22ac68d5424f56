"""The writer of plain chunks beside a handler: one write at a time, and a failed one is the handler's to meet."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from loraplex_gateway.grpc.writer import ChunkWriter
from loraplex_gateway.requests.stall import StallGuard
from loraplex_gateway.types import Chunk


class Tap:
    """Hands out what has been put into it, as one chunk."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def pull(self) -> Chunk | None:
        token_ids, self.tokens = tuple(self.tokens), []
        return Chunk(sequence=0, index=0, token_ids=token_ids, text="") if token_ids else None


class Context:
    """A call whose writes wait until they are let go."""

    def __init__(self) -> None:
        self.begun: list[list[int]] = []
        self.may_end = asyncio.Event()
        self.error: Exception | None = None

    async def write(self, message: Any) -> None:
        self.begun.append(list(message.chunk.token_ids))
        await self.may_end.wait()
        if self.error is not None:
            raise self.error


async def push(writer: ChunkWriter, tap: Tap, *tokens: int) -> None:
    for token in tokens:
        tap.tokens.append(token)
        writer.notify(tap)  # type: ignore[arg-type]
        await asyncio.sleep(0)


async def test_tokens_that_come_during_a_write_go_out_together_with_the_next() -> None:
    context, tap = Context(), Tap()
    writer = ChunkWriter(context, StallGuard(30.0))  # type: ignore[arg-type]

    await push(writer, tap, 1, 2, 3)
    assert context.begun == [[1]]
    context.may_end.set()
    await writer.idle()
    await push(writer, tap, 4)
    await writer.idle()

    assert context.begun == [[1], [2, 3], [4]]
    await writer.close()


async def test_a_failed_write_takes_no_more_and_is_met_by_the_handler_that_is_not_cancelled_for_it() -> None:
    context, tap = Context(), Tap()
    writer = ChunkWriter(context, StallGuard(30.0))  # type: ignore[arg-type]
    context.error = ConnectionResetError("gone")
    await push(writer, tap, 1)

    context.may_end.set()
    await writer.settled()

    assert not writer.is_ready()
    with pytest.raises(ConnectionResetError):
        await writer.idle()
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    await writer.close()
