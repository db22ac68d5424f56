"""Whatever Valkey answers, what its client raises is an error of the contract, with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import LoraplexError, SaturatedError, StoreUnavailableError
from loraplex_common.valkey import EmbeddedValkey, connect
from loraplex_common.valkey_errors import TranslatingClient, ValkeyRefusedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ANSWERS = {
    "OOM command not allowed when used memory > 'maxmemory'.": "delete adapters",
    "MISCONF Errors writing to the AOF file: No space left on device": "cannot write to its disk",
    "READONLY You can't write against a read only replica.": "name its primary",
    "LOADING Valkey is loading the dataset in memory": "is loading",
    "BUSY Valkey is busy running a script.": "busy with a script",
    "NOSCRIPT No matching script.": "refused a command",
    "CLUSTERDOWN The cluster is down": "a cluster is not served",
    "MASTERDOWN Link with MASTER is down": "lost its primary",
    "NOREPLICAS Not enough good replicas to write.": "too few replicas",
    "NOAUTH Authentication required.": "password",
    "WRONGPASS invalid username-password pair": "refuses user or password",
    "NOPERM User x has no permissions": "may not do this",
    "MOVED 1 127.0.0.1:1": "a cluster is not served",
    "WRONGTYPE Operation against a key holding the wrong kind of value": "WRONGTYPE",
    "ERR something else": "something else",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
async def client(server: EmbeddedValkey) -> AsyncIterator[TranslatingClient]:
    client = connect(server.url)
    yield client
    await client.aclose()


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("in_pipeline", [False, True])
async def test_every_kind_of_refusal_is_an_error_of_the_contract_with_its_remedy(
    client: TranslatingClient, answer: str, in_pipeline: bool
) -> None:
    script = f'return redis.error_reply("{answer}")'
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.eval(script, 0)
        with pytest.raises(LoraplexError) as caught:
            await (pipeline.execute() if in_pipeline else client.eval(script, 0))

    expected = SaturatedError if answer.startswith("OOM") else StoreUnavailableError
    assert isinstance(caught.value, expected)
    assert ANSWERS[answer] in caught.value.message
    assert caught.value.retry_after_s


async def test_a_server_that_is_gone_or_a_replica_or_short_of_replicas_gives_an_error_of_the_contract(
    tmp_path: Path,
) -> None:
    with EmbeddedValkey(tmp_path) as server:
        client = connect(server.url)
        await client.config_set("min-replicas-to-write", 1)
        with pytest.raises(ValkeyRefusedError, match="too few replicas"):
            await client.set("x", "y")
        await client.config_set("min-replicas-to-write", 0)
        await client.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(ValkeyRefusedError, match="replica"):
            await client.set("x", "y")
    with pytest.raises(StoreUnavailableError, match="cannot reach"):
        await client.get("x")
    await client.aclose()


async def test_a_connection_of_its_own_translates_too(client: TranslatingClient) -> None:
    async with client.client() as connection:
        with pytest.raises(ValkeyRefusedError):
            await connection.execute_command("NONSENSE")  # type: ignore[no-untyped-call]


def test_the_librarys_errors_are_known_in_one_place() -> None:
    root = Path(__file__).parents[3]
    users = {
        path.name
        for folder in ("services", "clients")
        for path in (root / folder).rglob("*.py")
        if "redis.exceptions" in path.read_text()
    }

    assert users == {"valkey_client.py", "valkey_errors.py"}
