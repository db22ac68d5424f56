"""A stack with small limits as pytest fixtures, and a client of it that must not disturb other requests."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from support.backend import kibibytes
from support.generation import Neighbour
from support.stack import Stack, StackFlags, assert_idle, running_stack
from support.stack_fixtures import import_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from loraplex_client import AsyncClient

MAX_IN_GATEWAY = 48  # running and queued together
MAX_ADAPTER_KIB = 3072  # the broadest adapter of a model with scaled widths takes 2.7 MB


@pytest.fixture(scope="module")
def strict_stack(tiny_world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with small limits: a small pool, and small uploads."""
    flags = StackFlags(
        engine=(
            *("--pool-bytes", kibibytes(640), "--arena-bytes", kibibytes(2048)),
            *("--max-model-len", "400", "--outbox-max-age-s", "2"),
        ),
        store=("--max-adapter-bytes", f"{MAX_ADAPTER_KIB}KiB"),
        gateway=("--max-queued-requests", "24", "--max-concurrent-requests", "24", "--slow-client-s", "10"),
    )
    with running_stack(tmp_path_factory.mktemp("strict"), *tiny_world, flags) as stack:
        import_all(stack)
        yield stack


@pytest.fixture(scope="module")
def neighbour() -> Neighbour:
    """The generation that no test of a module may disturb."""
    return Neighbour("tiny-c")


@asynccontextmanager
async def undisturbed_client(stack: Stack, neighbour: Neighbour) -> AsyncIterator[AsyncClient]:
    """Give out a client beside a neighbour that the block must not disturb, and wait until the engine is idle."""
    client = stack.client()
    async with neighbour.undisturbed(client):
        yield client
    await client.close()
    await assert_idle(stack.engines[0])
