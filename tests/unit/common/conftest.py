"""Fixtures of the tests of our gRPC server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_common.grpc_channel import open_channel
from support.echo_service import Echo, EchoClient, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def target(echo: Echo) -> AsyncIterator[str]:
    async with running(echo) as (_, address):
        yield address


@pytest.fixture
async def client(target: str) -> AsyncIterator[EchoClient]:
    async with open_channel(target) as channel:
        yield EchoClient(channel)
