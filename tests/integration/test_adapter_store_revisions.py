"""Revisions named by their first digits, and imports that leave ``latest`` alone, against a real Valkey."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.errors import AdapterNotFoundError, ConflictError, InvalidParameterError
from support.adapters import Recipe, write_adapter
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir, translated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration


@pytest.fixture
async def client(valkey_url: str, tmp_path: Path) -> AsyncIterator[StoreClient]:
    async with running_rig(store_config(valkey_url, import_root=(tmp_path,))) as (_, client):
        yield client


async def set_alias(client: StoreClient, label: str, revision: str, **fields: Any) -> dict[str, str]:
    alias = adapter_pb2.Alias(name="poet", label=label, revision=revision)
    with translated():
        response = await client.stub.SetAlias(pb.SetAliasRequest(alias=alias, **fields))
    return labels_of(response.adapter)


def labels_of(adapter: adapter_pb2.Adapter) -> dict[str, str]:
    return {alias.label: alias.revision for alias in adapter.aliases}


async def upload(client: StoreClient, seed: int, name: str = "poet", **header: Any) -> str:
    response = await client.upload_recipe(name, Recipe(rank=2, seed=seed), **header)
    return response.revision.revision


async def test_a_staged_import_leaves_latest_where_it_is(client: StoreClient) -> None:
    first = await upload(client, 1)

    second = await upload(client, 2, stage=True)
    third = await upload(client, 3, stage=True, label="canary")

    found = await client.get("poet")
    assert labels_of(found.adapter) == {"latest": first, "canary": third}
    assert found.revision.revision == first
    assert (await client.get(f"poet@{second}")).revision.revision == second
    assert await set_alias(client, "latest", second) == {"latest": second, "canary": third}


async def test_a_staged_import_from_a_directory_does_too(client: StoreClient, tmp_path: Path) -> None:
    first = await upload(client, 1)
    directory = write_adapter(tmp_path / "two", tiny_base_dir(), Recipe(rank=2, seed=2))

    result = await client.import_dir("poet", directory, stage=True)

    assert result.revision.revision != first
    assert labels_of(result.adapter) == {"latest": first}


async def test_the_first_import_of_a_name_can_be_staged(client: StoreClient) -> None:
    revision = await upload(client, 1, stage=True)

    assert labels_of((await client.get("poet")).adapter) == {}
    assert (await client.get(f"poet@{revision[:8]}")).revision.revision == revision
    with refused(AdapterNotFoundError, "canary"):
        await client.get("poet:canary")


async def test_a_staged_import_that_names_latest_contradicts_itself(client: StoreClient) -> None:
    with refused(InvalidParameterError, "a staged import leaves 'latest' where it is"):
        await upload(client, 1, stage=True, label="latest")


@pytest.mark.parametrize("digits", [8, 12, 63])
async def test_every_call_that_takes_a_revision_takes_its_first_digits(client: StoreClient, digits: int) -> None:
    first, second = await upload(client, 1), await upload(client, 2)
    start = first[:digits]

    assert (await client.get(f"poet@{start}")).revision.revision == first
    assert (await set_alias(client, "prod", start))["prod"] == first
    assert (await set_alias(client, "prod", second[:digits], expected_revision=start))["prod"] == second
    with translated():
        parts = [part async for part in client.stub.DownloadAdapter(pb.DownloadAdapterRequest(revision=start))]
        await client.stub.PrefetchAdapter(pb.PrefetchAdapterRequest(revision=start))
        await client.stub.EvictAdapter(pb.AdapterStoreServiceEvictAdapterRequest(revision=start))
    assert parts[-1].sha256 == first


async def test_a_label_can_point_at_another_names_revision_by_its_first_digits(client: StoreClient) -> None:
    await upload(client, 1)
    other = await upload(client, 2, name="other")

    assert (await set_alias(client, "borrowed", other[:12]))["borrowed"] == other


async def test_a_label_that_points_elsewhere_than_expected_stays(client: StoreClient) -> None:
    first = await upload(client, 1)

    with refused(ConflictError, first):
        await set_alias(client, "latest", first[:8], expected_revision="0" * 8)


@pytest.mark.parametrize(("text", "error"), [("0" * 8, AdapterNotFoundError), ("0" * 7, InvalidParameterError)])
async def test_digits_that_no_revision_begins_with_or_too_few_are_refused(
    client: StoreClient, text: str, error: type[Exception]
) -> None:
    await upload(client, 1)

    for attempt in (
        lambda: client.get(f"poet@{text}"),
        lambda: set_alias(client, "prod", text),
    ):
        with pytest.raises(error):
            await attempt()
    with pytest.raises(error), translated():
        await client.stub.PrefetchAdapter(pb.PrefetchAdapterRequest(revision=text))
