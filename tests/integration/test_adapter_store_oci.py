"""Imports from a registry: Debian's, behind a proxy that demands tokens, redirects and makes faults."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from loraplex_adapter_store.imports import registry as registries
from loraplex_adapter_store.imports.registry import Registry
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterForbiddenError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    InvalidParameterError,
    StoreUnavailableError,
)
from support.adapters import adapter_files
from support.fault_proxy import Cut, FaultProxy, Said, Seen, running_proxy
from support.oci_registry import INDEX, OciRegistry, running_registry
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir
from support.valkey import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration
REPO = "team/poet"
LOGIN = "Basic " + base64.b64encode(b"user:password").decode()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OciRegistry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def poet(registry: OciRegistry) -> str:
    return registry.push(REPO, adapter_files(tiny_base_dir()) | {"README.md": b"#"})


@pytest.fixture
def proxy(registry: OciRegistry) -> Iterator[FaultProxy]:
    with running_proxy(registry.url) as running:
        yield running


@pytest.fixture
def logins(tmp_path: Path) -> Path:
    path = tmp_path / "credentials"
    path.write_text("ours user password\nstatic given_token\n")
    return path


@asynccontextmanager
async def store_with(
    store_valkey: EmbeddedValkey, proxy: FaultProxy, logins: Path | None = None
) -> AsyncIterator[StoreClient]:
    config = store_config(
        fresh_database(store_valkey), import_registry=(Registry.parse(proxy.url),), credentials_file=logins
    )
    async with running_rig(config) as (_, client):
        yield client


def uri_of(proxy: FaultProxy, digest: str, repo: str = REPO) -> str:
    return f"oci://{urlsplit(proxy.url).netloc}/{repo}@{digest}"


def authorization_of(request: Seen) -> str:
    return next((value for name, value in request.headers.items() if name.lower() == "authorization"), "")


def demanding_token(proxy: FaultProxy, login: str) -> Any:
    """Demand tokens, which a login buys."""

    def fault(request: Seen) -> Said | None:
        if request.path.startswith("/token?"):
            return Said(200, b'{"token": "bought"}') if authorization_of(request) == login else Said(401)
        if authorization_of(request) in ("Bearer bought", "Bearer given_token"):
            return None
        challenge = f'Bearer realm="{proxy.url}/token",service="registry",scope="repository:{REPO}:pull,push"'
        return Said(401, headers={"WWW-Authenticate": challenge})

    return fault


@pytest.mark.parametrize("annotation", ["org.opencontainers.image.title", "org.cncf.model.filepath"])
async def test_the_layers_of_a_manifest_are_imported_by_their_files_names(
    store_valkey: EmbeddedValkey, registry: OciRegistry, proxy: FaultProxy, annotation: str
) -> None:
    digest = registry.push(REPO, adapter_files(tiny_base_dir()) | {"README.md": b"#"}, annotation=annotation)
    async with store_with(store_valkey, proxy) as client:
        result = await client.import_uri("a", uri_of(proxy, digest))
        uploaded = await client.upload("b", adapter_files(tiny_base_dir()))

    assert result.revision.source == uri_of(proxy, digest)
    assert result.revision.revision == uploaded.revision.revision
    assert len(proxy.seen) == 3, "the manifest and the two files that are read"


async def test_what_is_wrong_with_a_registry_source_is_said(
    store_valkey: EmbeddedValkey, registry: OciRegistry, proxy: FaultProxy, poet: str
) -> None:
    index = registry.manifest(REPO, {"schemaVersion": 2, "mediaType": INDEX, "manifests": []})
    archive = registry.push(REPO, {"poet": b"x"}, mediaType="application/vnd.oci.image.layer.v1.tar+gzip")
    pickle = registry.push(REPO, {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"})
    host = urlsplit(proxy.url).netloc
    async with store_with(store_valkey, proxy) as client:
        for uri, error, match in (
            (f"oci://{host}/{REPO}:latest", InvalidParameterError, "not of the form"),
            (f"oci://{host}/{REPO}", InvalidParameterError, "has no digest .*because tags move"),
            (f"oci://{host}/{REPO}@sha512:{'0' * 128}", InvalidParameterError, "has no digest"),
            (f"oci://ghcr.io/{REPO}@{poet}", InvalidParameterError, "of no registry .*--import-registry"),
            (f"oci://{host}/{REPO}/../x@{poet}", InvalidParameterError, "not of the form"),
            (uri_of(proxy, "sha256:" + "0" * 64), AdapterNotFoundError, "the manifest: the registry has no such thing"),
            (uri_of(proxy, index), AdapterIncompatibleError, "an index of 0 manifests"),
            (uri_of(proxy, archive), AdapterIncompatibleError, "an archive is not read; .*oras push"),
            (uri_of(proxy, pickle), AdapterIncompatibleError, "adapter_model.bin: pickled"),
        ):
            with refused(error, match):
                await client.import_uri("a", uri)
        assert await client.names() == []


@pytest.mark.parametrize("what", ["manifests", "blobs"])
async def test_bytes_that_do_not_have_their_digest_are_no_adapter(
    store_valkey: EmbeddedValkey, proxy: FaultProxy, poet: str, what: str
) -> None:
    manifest = json.dumps({"schemaVersion": 2, "layers": []}).encode()
    proxy.fault = lambda request: Said(200, manifest) if f"/{what}/" in request.path else None
    async with store_with(store_valkey, proxy) as client:
        with refused(AdapterCorruptUploadError, "its bytes have digest"):
            await client.import_uri("a", uri_of(proxy, poet))


async def test_a_redirect_to_the_storage_of_blobs_gets_no_authorization(
    store_valkey: EmbeddedValkey, registry: OciRegistry, proxy: FaultProxy, poet: str, logins: Path
) -> None:
    with running_proxy(registry.url) as storage:
        demands = demanding_token(proxy, LOGIN)

        def fault(request: Seen) -> Said | None:
            if (said := demands(request)) is not None or "/blobs/" not in request.path:
                return said  # type: ignore[no-any-return]
            return Said(307, headers={"Location": storage.url + request.path})

        proxy.fault = fault
        async with store_with(store_valkey, proxy, logins) as client:
            assert (await client.import_uri("a", uri_of(proxy, poet), credential_ref="ours")).revision.revision

        assert len(storage.seen) == 2
        assert [authorization_of(request) for request in storage.seen] == ["", ""]


async def test_a_token_is_bought_with_the_login_for_pulling_this_repository_alone(
    store_valkey: EmbeddedValkey, proxy: FaultProxy, poet: str, logins: Path
) -> None:
    proxy.fault = demanding_token(proxy, LOGIN)
    async with store_with(store_valkey, proxy, logins) as client:
        with refused(AdapterForbiddenError, "wants a credential; name one with access"):
            await client.import_uri("a", uri_of(proxy, poet))
        proxy.seen.clear()
        assert (await client.import_uri("a", uri_of(proxy, poet), credential_ref="ours")).revision.revision

        bought = [parse_qs(urlsplit(request.path).query) for request in proxy.seen if "/token" in request.path]
        assert bought == [{"service": ["registry"], "scope": [f"repository:{REPO}:pull"]}]
        assert (await client.import_uri("b", uri_of(proxy, poet), credential_ref="static")).revision.revision


async def test_an_expired_login_is_read_again_from_its_file_once(
    store_valkey: EmbeddedValkey, proxy: FaultProxy, poet: str, logins: Path
) -> None:
    renewed = "Basic " + base64.b64encode(b"user:renewed").decode()
    proxy.fault = demanding_token(proxy, renewed)
    async with store_with(store_valkey, proxy, logins) as client:
        with refused(AdapterForbiddenError, "refuses credential 'ours': it has expired, or has no access"):
            await client.import_uri("a", uri_of(proxy, poet), credential_ref="ours")
        assert sum("/token" in request.path for request in proxy.seen) == 2

        await asyncio.to_thread(logins.write_text, "ours user renewed\n")
        assert (await client.import_uri("a", uri_of(proxy, poet), credential_ref="ours")).revision.revision


async def test_a_token_that_expires_meanwhile_is_bought_again(
    store_valkey: EmbeddedValkey, proxy: FaultProxy, poet: str, logins: Path
) -> None:
    demands, num_uses = demanding_token(proxy, LOGIN), iter(range(100))

    def fault(request: Seen) -> Said | None:
        is_expired = "Bearer" in authorization_of(request) and next(num_uses) == 1
        return demands(Seen("GET", request.path, {}) if is_expired else request)  # type: ignore[no-any-return]

    proxy.fault = fault
    async with store_with(store_valkey, proxy, logins) as client:
        assert (await client.import_uri("a", uri_of(proxy, poet), credential_ref="ours")).revision.revision
    assert sum("/token" in request.path for request in proxy.seen) == 2


async def test_a_registry_that_is_busy_is_waited_for_and_a_cut_read_goes_on(
    store_valkey: EmbeddedValkey, proxy: FaultProxy, poet: str
) -> None:
    faults = iter([None, Said(503), Said(429, headers={"Retry-After": "0"}), Cut(50), None, Cut(1000)])
    proxy.fault = lambda _: next(faults, None)
    async with store_with(store_valkey, proxy) as client:
        assert (await client.import_uri("a", uri_of(proxy, poet))).revision.revision
    ranges = [value for request in proxy.seen for name, value in request.headers.items() if name.lower() == "range"]
    assert ranges == ["bytes=50-", "bytes=1000-"]


async def test_a_registry_that_stays_busy_is_unavailable(
    store_valkey: EmbeddedValkey, proxy: FaultProxy, poet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "PATIENCE_S", 0.3)
    proxy.fault = lambda _: Said(503)
    async with store_with(store_valkey, proxy) as client:
        with refused(StoreUnavailableError, "the registry answered 503"):
            await client.import_uri("a", uri_of(proxy, poet))
