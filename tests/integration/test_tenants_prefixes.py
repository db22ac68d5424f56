"""What one tenant sent to a real engine is no cached prefix of another's, unless their keys say that they share."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from loraplex_client import AsyncClient
from support.processes import ServiceProcess
from support.stack_fixtures import import_all
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.stack import Stack

pytestmark = pytest.mark.integration
KEYS = """
key-a a
key-a-too a
key-b b
key-red1 red1 group=red
key-red2 red2 group=red
key-red red
"""
BLOCK_TOKENS = 16
_prompts = itertools.count()


@pytest.fixture(scope="module")
def gateway(tiny_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A second gateway of the stack's engine: this one asks for keys."""
    import_all(tiny_stack)
    folder = tmp_path_factory.mktemp("tenants")
    (folder / "keys").write_text(KEYS)
    ports = ("--port", "0", "--http-port", "0", "--metrics-port", "0", "--drain-settle-s", "0")
    peers = ("--redis-url", tiny_stack.valkey.url, "--store-target", tiny_stack.store.grpc)
    process = ServiceProcess(
        "loraplex_gateway",
        ["--model", str(tiny_stack.model), *ports, *peers, "--api-keys-file", str(folder / "keys")],
        log_dir=folder,
    )
    yield process.wait_ready()
    assert process.stop() == 0


async def cached(gateway: ServiceProcess, name: str, prompt: list[int], adapter: str | None, salt: str = "") -> int:
    """Return how many of a prompt's tokens a tenant is told to have been cached."""
    async with AsyncClient(gateway.grpc, api_key=f"key-{name}") as client:
        done = await client.generate_once(
            prompt_token_ids=prompt, adapter=adapter, cache_salt=salt, max_new_tokens=1, timeout=60
        )
    return done.finished.usage.cached_tokens


@pytest.mark.parametrize("adapter", [None, "tiny-a"])
async def test_a_prompt_is_cached_for_its_tenant_and_its_group_alone(
    gateway: ServiceProcess, tiny_stack: Stack, adapter: str | None
) -> None:
    async def is_served() -> bool:
        async with AsyncClient(gateway.grpc, api_key="key-a") as client:
            return len(await client.list_models()) > 1

    await eventually(is_served, what="names known")
    first = 7 + next(_prompts)
    prompt, other = [first + n for n in range(50)], [first + n for n in range(50, 100)]
    all_blocks = 3 * BLOCK_TOKENS

    assert await cached(gateway, "a", prompt, adapter) == 0
    assert await cached(gateway, "a", prompt, adapter) == all_blocks
    assert await cached(gateway, "a-too", prompt, adapter) == all_blocks
    assert await cached(gateway, "b", prompt, adapter) == 0
    assert await cached(gateway, "b", prompt, adapter) == all_blocks

    assert await cached(gateway, "red1", other, adapter) == 0
    assert await cached(gateway, "red2", other, adapter) == all_blocks
    assert await cached(gateway, "red", other, adapter) == 0  # a tenant of the group's name
    assert await cached(gateway, "red2", other, adapter, "mine") == 0
    assert await cached(gateway, "red1", other, adapter, "mine") == all_blocks
