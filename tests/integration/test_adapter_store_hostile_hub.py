"""A hub, or a proxy before it, whose bodies have no end, another length than announced, or hardly come."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from google.longrunning import operations_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.imports import pace
from loraplex_adapter_store.imports.directory import ImportRoots
from loraplex_adapter_store.imports.download import MIN_STEP_BYTES
from loraplex_adapter_store.imports.threads import MAX_DOWNLOADS
from loraplex_common.errors import AdapterCorruptUploadError, DeadlineError, StoreUnavailableError
from support.adapters import Recipe, adapter_files
from support.hub_double import HubDouble, running_hub
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir, translated
from support.valkey import fresh_database
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from loraplex_adapter_store.service import RunningStore
    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MIB = 2**20
MAX_BYTES = 2 * MIB
WEIGHTS = "adapter_model.safetensors"


class HostileHub(HubDouble):
    """A repository whose bodies are sent as `sends` says.

    Attributes:
        sends: End of a path -> what makes its body, in chunks.
        headers: End of a path -> more headers.
    """

    def __init__(self, **sends: Any) -> None:
        super().__init__("org/adapter", COMMIT, dict(adapter_files(tiny_base_dir())))
        self.sends = {name.replace("__", "."): make for name, make in sends.items()}
        self.headers: dict[str, dict[str, str]] = {}

    def parts(self, path: str) -> Iterator[bytes] | None:
        make = next((make for end, make in self.sends.items() if path.endswith(end)), None)
        return None if make is None else make()

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        status, headers, body = super().answer(path, authorization)
        more = next((more for end, more in self.headers.items() if path.endswith(end)), {})
        return status, headers | more, body


@asynccontextmanager
async def store_with(store_valkey: EmbeddedValkey, hub: HubDouble) -> AsyncIterator[tuple[RunningStore, StoreClient]]:
    config = store_config(fresh_database(store_valkey), hf_endpoint=hub.url, max_adapter_bytes=MAX_BYTES)
    async with running_rig(config) as (store, client):
        yield store, client


async def import_from(client: StoreClient, name: str = "a") -> pb.ImportAdapterResult:
    source = pb.HuggingFaceSource(repo="org/adapter", revision=COMMIT)
    with translated():
        return await client.wait(await client.stub.ImportAdapter(pb.ImportAdapterRequest(name=name, hf=source)))


def endless() -> Iterator[bytes]:
    while True:
        yield b"x" * 65536


def trickle() -> Iterator[bytes]:
    while True:
        yield b"x"
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
async def test_a_body_without_end_is_left_at_the_limit(store_valkey: EmbeddedValkey, name: str) -> None:
    with running_hub(HostileHub(**{name.replace(".", "__"): endless})) as hub:
        async with store_with(store_valkey, hub) as (_, client):
            with refused(AdapterCorruptUploadError, f"{name}: .* at most .* are read"):
                await import_from(client)

    assert hub.num_sent < 16 * MIB, "what lies in socket buffers aside"


async def test_a_list_of_files_without_end_is_left(store_valkey: EmbeddedValkey) -> None:
    with running_hub(HostileHub(**{f"/revision/{COMMIT}": endless})) as hub:
        async with store_with(store_valkey, hub) as (_, client):
            with refused(AdapterCorruptUploadError, "its list of files: .* at most"):
                await import_from(client)


@pytest.mark.parametrize("difference", [-10, 10])
async def test_a_length_that_is_a_lie_is_no_adapter(store_valkey: EmbeddedValkey, difference: int) -> None:
    hub = HostileHub()
    with running_hub(hub):
        length = len(hub.files[WEIGHTS]) + difference
        hub.headers[WEIGHTS] = {"Content-Length": str(length)}
        async with store_with(store_valkey, hub) as (_, client):
            with pytest.raises((AdapterCorruptUploadError, StoreUnavailableError), match=r"bytes|downloaded"):
                await import_from(client)
            assert await client.names() == []


async def test_an_announced_length_above_the_limit_is_refused_before_anything_is_read(
    store_valkey: EmbeddedValkey,
) -> None:
    hub = HostileHub()
    with running_hub(hub):
        hub.headers[WEIGHTS] = {"Content-Length": str(MAX_BYTES + 1)}
        async with store_with(store_valkey, hub) as (_, client):
            with refused(AdapterCorruptUploadError, f"{MAX_BYTES + 1} bytes and more, at most {MAX_BYTES}"):
                await import_from(client)


async def test_a_body_that_trickles_is_left_in_time(
    store_valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "WINDOW_S", 0.3)
    with running_hub(HostileHub(**{WEIGHTS.replace(".", "__"): trickle})) as hub:
        async with store_with(store_valkey, hub) as (_, client):
            async with asyncio.timeout(20):
                with refused(DeadlineError, "too slow"):
                    await import_from(client)


async def test_an_error_without_end_is_an_error(store_valkey: EmbeddedValkey) -> None:
    class Failing(HostileHub):
        def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
            return 500, {}, b""

    with running_hub(Failing(**{COMMIT: endless})) as hub:
        async with store_with(store_valkey, hub) as (_, client):
            with refused(StoreUnavailableError, "answered 500"):
                await import_from(client)


async def test_redirects_are_followed_to_an_end_and_only_so_often(store_valkey: EmbeddedValkey) -> None:
    class Redirecting(HostileHub):
        num_hops = 3

        def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
            hop, is_hop, rest = path.removeprefix("/hop").partition("!")
            if not is_hop and "/resolve/" not in path:
                return super().answer(path, authorization)
            number, target = (int(hop), rest) if is_hop else (0, path)
            if number >= self.num_hops:
                return super().answer(target, authorization)
            return 302, {"Location": f"/hop{number + 1}!{target}"}, b"moved"

    hub = Redirecting()
    with running_hub(hub):
        async with store_with(store_valkey, hub) as (_, client):
            assert (await import_from(client)).revision.revision
            hub.num_hops = 50
            with refused(StoreUnavailableError, "too many redirects"):
                await import_from(client, "b")


async def test_a_connection_that_breaks_is_made_again_and_only_the_rest_is_fetched(
    store_valkey: EmbeddedValkey,
) -> None:
    class Breaking(HostileHub):
        num_broken = 0

        def parts(self, path: str) -> Iterator[bytes] | None:
            return self._broken(path) if path.endswith(WEIGHTS) and self.requests.count(path) == 1 else None

        def _broken(self, path: str) -> Iterator[bytes]:
            self.num_broken += 1
            yield self.files[WEIGHTS][:100]
            raise ConnectionResetError

    hub = Breaking()
    with running_hub(hub):
        async with store_with(store_valkey, hub) as (_, client):
            assert (await import_from(client)).revision.revision
        assert hub.num_broken == 1
        others = sum(len(data) for name, data in hub.files.items() if name.endswith(".json"))
        assert hub.num_sent < len(hub.files[WEIGHTS]) + others + 10_000


async def test_downloads_that_trickle_hold_what_has_come_and_keep_nobody_out(store_valkey: EmbeddedValkey) -> None:
    num_slow = MAX_DOWNLOADS + 2
    with running_hub(HostileHub(**{WEIGHTS.replace(".", "__"): trickle})) as hub:
        async with store_with(store_valkey, hub) as (store, client):
            budget = store.importer.budget
            for number in range(num_slow):
                source = pb.HuggingFaceSource(repo="org/adapter", revision=COMMIT)
                request = pb.ImportAdapterRequest(name=f"slow{number}", hf=source, base_model=f"tiny{number}")
                await client.stub.ImportAdapter(request)
            await eventually(lambda: sum(path.endswith(WEIGHTS) for path in hub.requests) >= MAX_DOWNLOADS)
            await eventually(lambda: budget.held_bytes > 0)

            assert budget.held_bytes <= MAX_DOWNLOADS * 2 * MIN_STEP_BYTES, "not the largest adapter of each"
            async with asyncio.timeout(20):
                for number in range(3):
                    await client.upload_recipe(f"fast{number}", Recipe(seed=number))

            operations = await client.operations.ListOperations(operations_pb2.ListOperationsRequest())
            for operation in operations.operations:
                await client.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=operation.name))
            await eventually(lambda: budget.held_bytes == 0)


def test_a_directory_takes_the_room_of_its_files(tmp_path: Path) -> None:
    sizes = {}
    for name, data in adapter_files(tiny_base_dir()).items():
        (tmp_path / name).write_bytes(data)
        sizes[name] = len(data)
    taken: list[int] = []

    ImportRoots((tmp_path,)).read(tmp_path.as_uri(), 64 * MIB, taken.append)

    assert sorted(taken) == sorted(sizes.values())
