"""Imports per tenant and day: what counts, when they are refused, and when they are free again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.errors import AdapterCorruptUploadError, LoraplexError, TenantQuotaError
from support.adapters import Recipe, adapter_files
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir, translated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration
NAMES = ("a", "b", "c")


@asynccontextmanager
async def limited(url: str, tmp_path: Path, limit: int | str) -> AsyncIterator[StoreClient]:
    """Run a store in which acme may import so often, with three names of acme's."""
    file = tmp_path / "quotas.toml"
    file.write_text(f"[tenants.acme]\nimports_per_day = {limit}\n")
    async with running_rig(store_config(url, quotas_file=file, import_root=(tmp_path,))) as (_, client):
        yield client


async def create(client: StoreClient, *names: str, tenants: tuple[str, ...] = ("acme",)) -> None:
    for name in names:
        with translated():
            adapter = adapter_pb2.Adapter(name=name, allowed_tenants=tenants)
            await client.stub.CreateAdapter(pb.CreateAdapterRequest(adapter=adapter))


def folder(tmp_path: Path, seed: int) -> Path:
    path = tmp_path / f"seed-{seed}"
    path.mkdir()
    for name, data in adapter_files(tiny_base_dir(), Recipe(seed=seed)).items():
        (path / name).write_bytes(data)
    return path


async def test_a_tenant_imports_as_often_as_it_may_by_whatever_way_and_others_go_on(
    redis_url: str, tmp_path: Path
) -> None:
    async with limited(redis_url, tmp_path, 2) as client:
        await create(client, *NAMES)
        await create(client, "both", tenants=("rival", "acme"))
        await create(client, "other", tenants=("rival",))
        await client.upload_recipe("a", Recipe(seed=0))
        await client.import_dir("b", folder(tmp_path, 1))

        with pytest.raises(TenantQuotaError) as caught:
            await client.upload_recipe("c", Recipe(seed=2))
        with refused(TenantQuotaError, "tenant 'acme'"):
            await client.import_dir("both", folder(tmp_path, 3))

        error = caught.value
        assert "2 imports a day are allowed, and 2 are used; one is free again every 12h0m: retry in " in error.message
        assert (error.exceeded[0].tenant, error.exceeded[0].limit, error.exceeded[0].value) == (
            "acme",
            "imports_per_day",
            2,
        )
        assert error.retry_after_s is not None
        assert 12 * 3600 - 120 < error.retry_after_s <= 12 * 3600
        await client.upload_recipe("other", Recipe(seed=2))
        await client.upload_recipe("for-all", Recipe(seed=3))


async def test_an_import_that_fails_is_given_back(redis_url: str, tmp_path: Path) -> None:
    bad = adapter_files(tiny_base_dir(), Recipe()) | {"adapter_model.safetensors": b"no tensors"}
    async with limited(redis_url, tmp_path, 1) as client:
        await create(client, *NAMES)
        for _ in range(3):
            with pytest.raises(AdapterCorruptUploadError):
                await client.upload("a", bad)
        with pytest.raises(LoraplexError):
            await client.import_dir("a", tmp_path / "nothing-there")

        await client.upload_recipe("a", Recipe(seed=0))
        with pytest.raises(TenantQuotaError):
            await client.upload_recipe("b", Recipe(seed=1))


async def test_of_imports_at_once_on_two_replicas_as_many_are_taken_as_there_are_left(
    redis_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "quotas.toml"
    async with (
        limited(redis_url, tmp_path, 3) as one,
        running_rig(store_config(redis_url, quotas_file=file)) as (_, two),
    ):
        names = [f"n-{number}" for number in range(8)]
        await create(one, *names)

        uploads = [(one, two)[n % 2].upload_recipe(name, Recipe(seed=n)) for n, name in enumerate(names)]
        ended = await asyncio.gather(*uploads, return_exceptions=True)

        assert sum(isinstance(each, TenantQuotaError) for each in ended) == 5
        assert sum(isinstance(each, pb.UploadAdapterResponse) for each in ended) == 3


async def test_zero_allows_none_and_unlimited_counts_none(redis_url: str, tmp_path: Path) -> None:
    async with limited(redis_url, tmp_path, 0) as client:
        await create(client, *NAMES)
        with pytest.raises(TenantQuotaError, match="0 imports a day are allowed") as caught:
            await client.upload_recipe("a")
        assert caught.value.retry_after_s is None
    async with limited(redis_url, tmp_path, '"unlimited"') as client:
        for n, name in enumerate(NAMES):
            await client.upload_recipe(name, Recipe(seed=n))


async def test_a_repeated_call_counts_once(redis_url: str, tmp_path: Path) -> None:
    request_id = "6d0f9c52-9c2e-4a57-9d6a-0f6f7a1f8a11"
    async with limited(redis_url, tmp_path, 1) as client:
        await create(client, "a")
        first = await client.upload_recipe("a", request_id=request_id)
        again = await client.upload_recipe("a", request_id=request_id)

        assert again.revision.revision == first.revision.revision
