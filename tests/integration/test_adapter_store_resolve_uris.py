"""Sources that requests name in object storage and registries: within what the operator lets be imported, and no further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.imports.registry import Registry
from loraplex_adapter_store.object_storage import Bucket
from loraplex_adapter_store.resolve.rules import ResolveRule
from loraplex_common.errors import AdapterForbiddenError, AdapterNotFoundError, InvalidParameterError
from support.adapters import Recipe, adapter_files
from support.oci_registry import running_registry
from support.s3_server import BUCKET, KEYS, running_storage
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir, translated

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


async def resolve(client: StoreClient, source: str, tenant: str = "red") -> pb.ResolveAdapterResponse:
    with translated():
        request = pb.ResolveAdapterRequest(source=source, tenant=tenant)
        answer: pb.ResolveAdapterResponse = await client.stub.ResolveAdapter(request, timeout=30)
    return answer


def config_of(url: str, *rules: str, **config: Any) -> Any:
    return store_config(url, resolve_from=tuple(map(ResolveRule.parse, rules)), **config)


async def test_a_folder_of_object_storage_is_taken_as_it_is_when_it_is_read_first(
    redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text(f"ours {KEYS[0]} {KEYS[1]}\n")
    with running_storage() as storage:
        storage.put("open/poet", adapter_files(tiny_base_dir(), Recipe(seed=1)))
        storage.put("closed/poet", adapter_files(tiny_base_dir(), Recipe(seed=2)))
        bucket = (Bucket.parse(storage.url_below("open")),)
        rules = (f"s3://{BUCKET}/?credential=ours",)
        config = config_of(redis_url, *rules, import_bucket=bucket, credentials_file=tmp_path / "credentials")
        async with running_rig(config) as (_, client):
            first = await resolve(client, f"s3://{BUCKET}/open/poet")
            storage.put("open/poet", adapter_files(tiny_base_dir(), Recipe(seed=3)))
            again = await resolve(client, f"s3://{BUCKET}/open/poet/")
            blue = await resolve(client, f"s3://{BUCKET}/open/poet", "blue")

            assert (again.name, again.revision, again.is_new) == (first.name, first.revision, False)
            assert (blue.revision, blue.is_new) == (first.revision, True)
            with refused(InvalidParameterError, "in no bucket that this store imports from"):
                await resolve(client, f"s3://{BUCKET}/closed/poet")
            with refused(AdapterNotFoundError, "nothing lies there"):
                await resolve(client, f"s3://{BUCKET}/open/none")
            with refused(AdapterForbiddenError, "in no source that the operator allows"):
                await resolve(client, "s3://other/open/poet")


async def test_a_manifest_of_a_registry_is_named_by_its_digest(redis_url: str, tmp_path: Path) -> None:
    with running_registry(tmp_path) as registry:
        digest = registry.push("team/poet", adapter_files(tiny_base_dir(), Recipe(seed=1)))
        host = registry.url.partition("://")[2]
        config = config_of(redis_url, f"oci://{host}/team/", import_registry=(Registry.parse(registry.url),))
        async with running_rig(config) as (_, client):
            answer = await resolve(client, f"oci://{host}/team/poet@{digest}")

            assert answer.source == f"oci://{host}/team/poet@{digest}"
            with refused(InvalidParameterError, "has no digest"):
                await resolve(client, f"oci://{host}/team/poet")
            with refused(AdapterNotFoundError, "no such thing"):
                await resolve(client, f"oci://{host}/team/poet@sha256:{'0' * 64}")
            with refused(AdapterForbiddenError, "operator allows"):
                await resolve(client, f"oci://{host}/other/poet@{digest}")
