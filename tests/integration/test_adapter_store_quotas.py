"""Bytes of adapters per tenant: whose they are, when they are refused, and when they are free again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis
from google.protobuf.field_mask_pb2 import FieldMask
from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.repository import keys
from loraplex_common.errors import TenantQuotaError
from support.adapters import Recipe
from support.store_rig import StoreClient, refused, running_rig, store_config, translated
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration


@asynccontextmanager
async def limited(url: str, tmp_path: Path, limit: int | str) -> AsyncIterator[StoreClient]:
    """Run a store in which acme may have so many bytes; without a file if it is ``none``."""
    file = tmp_path / f"{limit}.toml"
    if isinstance(limit, int):
        file.write_text(f"[tenants.acme]\nmax_adapter_bytes = {limit}\n")
    async with running_rig(store_config(url, quotas_file=file if file.exists() else None)) as (_, client):
        yield client


async def create(client: StoreClient, name: str, *tenants: str) -> None:
    with translated():
        await client.stub.CreateAdapter(
            pb.CreateAdapterRequest(adapter=adapter_pb2.Adapter(name=name, allowed_tenants=tenants))
        )


async def allow(client: StoreClient, name: str, *tenants: str) -> None:
    with translated():
        await client.stub.UpdateAdapter(
            pb.UpdateAdapterRequest(
                adapter=adapter_pb2.Adapter(name=name, allowed_tenants=tenants),
                update_mask=FieldMask(paths=["allowed_tenants"]),
            )
        )


async def delete(client: StoreClient, name: str) -> None:
    with translated():
        await client.stub.DeleteAdapter(pb.DeleteAdapterRequest(name=name))


def recipe(seed: int) -> Recipe:
    return Recipe(seed=seed)


async def size_of(url: str, tmp_path: Path) -> int:
    """Return the canonical bytes of any recipe here."""
    async with limited(url, tmp_path, "none") as client:
        done = await client.upload_recipe("measured", recipe(0))
        return int(done.revision.canonical_bytes)


def counted(url: str, tenant: str = "acme") -> dict[str, int]:
    """Return what is kept of a tenant's bytes."""
    with redis.Redis.from_url(url) as client:
        found: Any = client.hgetall(keys.tenant_bytes(tenant))
        return {name.decode(): int(size) for name, size in found.items()}


async def test_a_tenant_gets_no_more_bytes_than_it_may_and_others_do(valkey_url: str, tmp_path: Path) -> None:
    size = await size_of(valkey_url, tmp_path)
    async with limited(valkey_url, tmp_path, 2 * size + 5) as client:
        for name in ("a", "b", "c"):
            await create(client, name, "acme")
        await create(client, "other", "rival")
        for n, name in enumerate(("a", "b")):
            await client.upload_recipe(name, recipe(n))

        with pytest.raises(TenantQuotaError) as caught:
            await client.upload_recipe("c", recipe(7))

        error = caught.value
        assert f"({2 * size + 5} bytes)" in error.message
        assert f"other adapters have {2 * size} bytes, and c would grow from 0 to {size}" in error.message
        assert (error.exceeded[0].tenant, error.exceeded[0].limit) == ("acme", "max_adapter_bytes")
        assert error.retry_after_s is None
        assert not (await client.get("c")).adapter.HasField("latest")
        await client.upload_recipe("other", recipe(7))
        await client.upload_recipe("for-everybody", recipe(8))


async def test_a_limit_that_is_just_reached_is_none_exceeded_and_zero_allows_nothing(
    valkey_url: str, tmp_path: Path
) -> None:
    size = await size_of(valkey_url, tmp_path)
    async with limited(valkey_url, tmp_path, size) as client:
        await create(client, "a", "acme")
        await client.upload_recipe("a", recipe(0))
        assert counted(valkey_url) == {"": size, "a": size}
        with refused(TenantQuotaError, "would grow from"):
            await client.upload_recipe("a", recipe(1))  # a second revision of the same name is kept, and counts
        await delete(client, "a")
    async with limited(valkey_url, tmp_path, 0) as client:
        await create(client, "b", "acme")
        with refused(TenantQuotaError, "0 B \\(0 bytes\\)"):
            await client.upload_recipe("b", recipe(0))


async def test_what_is_refused_leaves_no_blob(valkey_url: str, tmp_path: Path) -> None:
    async with limited(valkey_url, tmp_path, 1) as client:
        await create(client, "a", "acme")
        with refused(TenantQuotaError, "a would grow"):
            await client.upload_recipe("a", recipe(3))

        with redis.Redis.from_url(valkey_url) as valkey:
            assert not valkey.keys("a:{*")  # not even for a moment: it is asked before the blob is written


async def test_new_tenants_of_an_adapter_need_room_for_it(valkey_url: str, tmp_path: Path) -> None:
    size = await size_of(valkey_url, tmp_path)
    async with limited(valkey_url, tmp_path, size) as client:
        for n, name in enumerate(("a", "b")):
            await client.upload_recipe(name, recipe(n))
        await allow(client, "a", "rival")
        await allow(client, "a", "rival", "acme")

        with refused(TenantQuotaError, f"other adapters have {size} bytes, and b would grow from 0 to {size}"):
            await allow(client, "b", "acme")
        assert list((await client.get("b")).adapter.allowed_tenants) == []

        await allow(client, "a", "rival")
        await allow(client, "b", "acme")
        assert counted(valkey_url) == {"": size, "b": size}
        assert counted(valkey_url, "rival") == {"": size, "a": size}
        await allow(client, "b")
        assert counted(valkey_url) == {}


async def test_a_deletion_frees_the_bytes_at_once(valkey_url: str, tmp_path: Path) -> None:
    size = await size_of(valkey_url, tmp_path)
    async with limited(valkey_url, tmp_path, size) as client:
        for n in range(3):
            await create(client, "a", "acme")
            await client.upload_recipe("a", recipe(n))
            await delete(client, "a")

            assert counted(valkey_url) == {}


async def test_of_imports_at_the_same_time_no_more_get_in_than_there_is_room_for(
    valkey_url: str, tmp_path: Path
) -> None:
    size = await size_of(valkey_url, tmp_path)
    limit = 3 * size
    async with limited(valkey_url, tmp_path, limit) as one, limited(valkey_url, tmp_path, limit) as two:
        for n in range(8):
            await create(one, f"a{n}", "acme")

        results = await asyncio.gather(
            *((one, two)[n % 2].upload_recipe(f"a{n}", recipe(n)) for n in range(8)), return_exceptions=True
        )

        refusals = [result for result in results if isinstance(result, BaseException)]
        assert [type(refusal) for refusal in refusals] == [TenantQuotaError] * 5
        assert counted(valkey_url)[""] == limit


async def test_a_lowered_limit_takes_nothing_away_and_stops_only_what_grows(valkey_url: str, tmp_path: Path) -> None:
    size = await size_of(valkey_url, tmp_path)
    async with limited(valkey_url, tmp_path, 2 * size) as client:
        await create(client, "a", "acme")
        for n in range(2):
            await client.upload_recipe("a", recipe(n))
    async with limited(valkey_url, tmp_path, size) as client:
        await client.upload_recipe("a", recipe(0))  # a revision that it has
        await allow(client, "a", "acme", "rival")
        with refused(TenantQuotaError, f"would grow from {2 * size} to {3 * size}"):
            await client.upload_recipe("a", recipe(2))


async def test_a_changed_file_holds_for_the_next_import(valkey_url: str, tmp_path: Path) -> None:
    async with limited(valkey_url, tmp_path, 1) as client:
        await create(client, "a", "acme")
        with refused(TenantQuotaError, "a would grow"):
            await client.upload_recipe("a", recipe(0))
        (tmp_path / "1.toml").write_text('[tenants.acme]\nmax_adapter_bytes = "1MiB"\n')

        async def is_imported() -> bool:
            try:
                await client.upload_recipe("a", recipe(0))
            except TenantQuotaError:
                return False
            return True

        await eventually(is_imported, timeout_s=5.0)


async def test_what_was_imported_before_bytes_were_counted_counts(valkey_url: str, tmp_path: Path) -> None:
    size = await size_of(valkey_url, tmp_path)
    async with limited(valkey_url, tmp_path, "none") as client:
        await create(client, "old", "acme")
        await client.upload_recipe("old", recipe(0))
    with redis.Redis.from_url(valkey_url) as valkey:
        valkey.delete(keys.tenant_bytes("acme"), keys.COUNTED)  # as an older version leaves it

    async with limited(valkey_url, tmp_path, size + 1) as client:
        await create(client, "new", "acme")
        with refused(TenantQuotaError, f"other adapters have {size} bytes"):
            await client.upload_recipe("new", recipe(1))
        assert counted(valkey_url) == {"": size, "old": size}
