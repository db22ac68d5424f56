"""Sources that requests name: allowed, pinned, fetched once, each tenant's own, remembered when refused, deleted unused."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.resolve.resolver import source_key
from loraplex_adapter_store.resolve.rules import AskedSource, ResolveRule
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterForbiddenError,
    AdapterNotFoundError,
    AdapterUntrustedError,
    InvalidParameterError,
    LoraplexError,
    SaturatedError,
    StoreUnavailableError,
    TenantQuotaError,
)
from support.adapters import Recipe, adapter_files
from support.hub_double import HubDouble, running_hub
from support.model_signatures import key, trust_text
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir, translated
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration
COMMIT, LATER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
SOURCE = f"hf:acme/poet@{COMMIT}"
WEIGHTS = "adapter_model.safetensors"


class SlowHub(HubDouble):
    """A hub that sends no weights before it may."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.may_send = threading.Event()

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        if path.endswith(WEIGHTS):
            assert self.may_send.wait(30)
        return super().answer(path, authorization)


class ManyHub(HubDouble):
    """A hub in which every repository of acme's has an adapter of its own."""

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        self.repo = "/".join(parts[:2])
        self.files = adapter_files(tiny_base_dir(), Recipe(seed=int(parts[1].removeprefix("n"))))
        return super().answer(path, authorization)


def hub_of(cls: type[HubDouble] = HubDouble, token: str | None = None) -> HubDouble:
    return cls("acme/poet", COMMIT, adapter_files(tiny_base_dir(), Recipe(seed=3)), token)


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    with running_hub(hub_of()) as hub:
        yield hub


@pytest.fixture
def slow() -> Iterator[SlowHub]:
    hub = hub_of(SlowHub)
    assert isinstance(hub, SlowHub)
    with running_hub(hub):
        try:
            yield hub
        finally:
            hub.may_send.set()


@asynccontextmanager
async def resolving(url: str, hub: HubDouble, *rules: str, **config: Any) -> AsyncIterator[StoreClient]:
    parsed = tuple(ResolveRule.parse(rule) for rule in rules or ("hf:acme/",))
    async with running_rig(store_config(url, hf_endpoint=hub.url, resolve_from=parsed, **config)) as (_, client):
        yield client


async def resolve(
    client: StoreClient, source: str = SOURCE, tenant: str = "red", **call: Any
) -> pb.ResolveAdapterResponse:
    with translated():
        request = pb.ResolveAdapterRequest(source=source, tenant=tenant)
        answer: pb.ResolveAdapterResponse = await client.stub.ResolveAdapter(request, **call)
    return answer


def num_fetched(hub: HubDouble) -> int:
    return sum(path.endswith(WEIGHTS) for path in hub.requests)


def quotas(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "quotas.toml"
    file.write_text(f"[tenants.red]\n{text}\n")
    return file


async def test_without_a_rule_nothing_is_resolved_and_nothing_is_asked(redis_url: str, hub: HubDouble) -> None:
    async with running_rig(store_config(redis_url, hf_endpoint=hub.url)) as (_, client):
        with refused(AdapterNotFoundError, "resolves no sources at request time"):
            await resolve(client)
    assert hub.requests == []


async def test_many_callers_of_two_tenants_on_two_replicas_fetch_once_and_each_tenant_has_a_name_of_its_own(
    redis_url: str, hub: HubDouble
) -> None:
    async with resolving(redis_url, hub) as one, resolving(redis_url, hub) as two:
        calls = [resolve((one, two)[n % 2], tenant=("red", "blue")[n // 2 % 2]) for n in range(32)]
        answers = await asyncio.gather(*calls)

        assert num_fetched(hub) == 1
        names = {answer.name for answer in answers}
        assert len(names) == 2
        assert all(name.startswith("resolved/") for name in names)
        assert {(answer.source, answer.revision) for answer in answers} == {(SOURCE, answers[0].revision)}
        kept = [(await one.get(name)).adapter for name in names]
        assert sorted(tuple(adapter.allowed_tenants) for adapter in kept) == [("blue",), ("red",)]
        assert {adapter.latest.revision for adapter in kept} == {answers[0].revision}
        assert not (await resolve(two)).is_new


async def test_a_source_without_a_commit_is_pinned_and_looked_up_again_after_a_while(
    redis_url: str, hub: HubDouble
) -> None:
    async with resolving(redis_url, hub, resolve_pin_s=0.6) as client:
        first = await resolve(client, "hf:acme/poet")
        hub.commit, hub.files = LATER, adapter_files(tiny_base_dir(), Recipe(seed=4))
        still = await resolve(client, "hf:acme/poet")

        async def has_moved() -> bool:
            return (await resolve(client, "hf:acme/poet")).source == f"hf:acme/poet@{LATER}"

        assert (first.source, still.name) == (SOURCE, first.name)
        await eventually(has_moved, what="the later commit")
        assert (await resolve(client)).name == first.name  # the commit that is asked for by itself


async def test_while_the_hub_is_away_a_source_without_a_commit_stays_at_its_last_one(
    redis_url: str, hub: HubDouble
) -> None:
    async with resolving(redis_url, hub, resolve_pin_s=0.05) as client:
        first = await resolve(client, "hf:acme/poet")
        await asyncio.sleep(0.1)
        hub.answer = lambda path, authorization: (503, {}, b"")  # type: ignore[method-assign]

        assert (await resolve(client, "hf:acme/poet")).name == first.name
        with pytest.raises(StoreUnavailableError):
            await resolve(client, "hf:acme/other")


async def test_a_tenant_names_only_what_the_operator_allows_it(redis_url: str, hub: HubDouble) -> None:
    rules = ("hf:acme/poet?tenant=red&tenant=green", "s3://bucket/open/")
    async with resolving(redis_url, hub, *rules) as client:
        assert (await resolve(client, tenant="green")).is_new
        for source in (f"hf:acme/poet2@{COMMIT}", "hf:other/poet", "s3://bucket/closed/a", "oci://host/a@sha256:0"):
            with refused(AdapterForbiddenError, "in no source that the operator allows"):
                await resolve(client, source)
        with refused(AdapterForbiddenError, "tenant 'blue' may not name"):
            await resolve(client, tenant="blue")
        with refused(InvalidParameterError, "no folder"):
            await resolve(client, "s3://bucket/open/../closed/a")
        for text in (
            "",
            "poet",
            "poet:prod",
            "hf:acme",
            "hf:acme/poet@main",
            "hf:acme/poet@",
            "hf:a/b/../c",
            "hf:a/b@" + "0" * 41,
        ):
            with pytest.raises((InvalidParameterError, AdapterForbiddenError)):
                await resolve(client, text)
        with refused(InvalidParameterError, "not of 1 to 256"):
            await resolve(client, tenant="")


async def test_a_private_repository_is_read_with_the_operators_credential_and_no_other(
    redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("ours hf_secret\n")
    with running_hub(hub_of(token="hf_secret")) as hub:
        rules = ("hf:acme/?credential=ours&tenant=red", "hf:acme/?tenant=blue")
        async with resolving(redis_url, hub, *rules, credentials_file=tmp_path / "credentials") as client:
            assert (await resolve(client)).is_new
            with refused(AdapterNotFoundError, "not visible with this credential"):
                await resolve(client, tenant="blue")


async def test_a_refusal_is_remembered_for_all_replicas_and_forgotten_after_a_while(
    redis_url: str, hub: HubDouble
) -> None:
    async with (
        resolving(redis_url, hub, resolve_refusal_s=0.8) as one,
        resolving(redis_url, hub, resolve_refusal_s=0.8) as two,
    ):
        for n in range(6):
            with refused(AdapterNotFoundError, "hf:acme/later"):
                await resolve((one, two)[n % 2], f"hf:acme/later@{COMMIT}", tenant=("red", "blue")[n % 2])
        assert len(hub.requests) == 1

        hub.repo = "acme/later"

        async def is_there() -> bool:
            try:
                return bool((await resolve(one, f"hf:acme/later@{COMMIT}")).name)
            except AdapterNotFoundError:
                return False

        await eventually(is_there, what="the repository")


async def test_a_bad_adapter_is_fetched_once_and_refused_by_name(redis_url: str, hub: HubDouble) -> None:
    hub.files[WEIGHTS] = b"no tensors"
    async with resolving(redis_url, hub) as client:
        for _ in range(3):
            with pytest.raises(AdapterCorruptUploadError):
                await resolve(client)
        assert num_fetched(hub) == 1
        assert await client.names() == []


async def test_a_caller_that_gives_up_leaves_the_import_to_others(redis_url: str, slow: SlowHub) -> None:
    async with resolving(redis_url, slow) as client:
        with pytest.raises(LoraplexError):
            await resolve(client, timeout=0.3)
        waiting = asyncio.create_task(resolve(client))
        given_up = asyncio.create_task(resolve(client))
        await asyncio.sleep(0.1)
        given_up.cancel()
        slow.may_send.set()

        assert (await waiting).source == SOURCE
        assert num_fetched(slow) == 1


async def test_one_tenant_takes_no_more_than_half_of_what_is_resolved_at_once(redis_url: str, slow: SlowHub) -> None:
    async with resolving(redis_url, slow, max_resolving=4) as client:
        sources = [f"hf:acme/poet/f{n}@{COMMIT}" for n in range(4)]
        slow.files = {f"f{n}/{name}": data for n in range(4) for name, data in slow.files.items()}
        reds = [asyncio.create_task(resolve(client, source)) for source in sources[:2]]
        await eventually_asked(slow, 2)
        with refused(SaturatedError, "2 sources of tenant 'red'") as caught:
            await resolve(client, sources[2])
        blues = [asyncio.create_task(resolve(client, source, "blue")) for source in sources[2:]]
        await eventually_asked(slow, 4)
        with refused(SaturatedError, "at most 4 at once"):
            await resolve(client, sources[0], "green")
        slow.may_send.set()

        assert caught.value.retry_after_s is not None
        assert len({answer.name for answer in await asyncio.gather(*reds, *blues)}) == 4


async def eventually_asked(hub: HubDouble, num_listings: int) -> None:
    async def is_asked() -> bool:
        return sum(path.startswith("/api/") for path in hub.requests) >= num_listings

    await eventually(is_asked, what="the hub is asked")


async def test_imports_of_a_tenant_are_counted_and_given_back(redis_url: str, hub: HubDouble, tmp_path: Path) -> None:
    file = quotas(tmp_path, "imports_per_day = 1")
    async with resolving(redis_url, hub, quotas_file=file) as client:
        with pytest.raises(AdapterNotFoundError):
            await resolve(client, f"hf:acme/none@{COMMIT}")
        await resolve(client)
        await resolve(client)
        with refused(TenantQuotaError, "1 imports a day are allowed, and 1 are used"):
            await resolve(client, f"hf:acme/another@{COMMIT}")
        await resolve(client, tenant="blue")


async def test_a_tenant_without_room_loses_its_own_least_recently_used_adapter_and_no_other(
    redis_url: str, tmp_path: Path
) -> None:
    with running_hub(hub_of(ManyHub)) as hub:
        async with resolving(redis_url, hub) as client:
            old = await resolve(client, f"hf:acme/n0@{COMMIT}")
            size = (await client.get(old.name)).revision.canonical_bytes
            blue = await resolve(client, f"hf:acme/n0@{COMMIT}", "blue")
        file = quotas(tmp_path, f"max_adapter_bytes = {2 * size}")
        async with resolving(redis_url, hub, quotas_file=file) as client:
            kept = await resolve(client, f"hf:acme/n1@{COMMIT}")
            await resolve(client, f"hf:acme/n0@{COMMIT}")
            new = await resolve(client, f"hf:acme/n2@{COMMIT}")

            assert sorted(await client.names()) == sorted([old.name, blue.name, new.name])
            assert kept.name not in await client.names()
            other = await resolve(client, f"hf:acme/n4@{COMMIT}", "blue")
            same = await resolve(client, f"hf:acme/n4@{COMMIT}")  # is in the store already
            assert sorted(await client.names()) == sorted([blue.name, other.name, new.name, same.name])
        async with resolving(redis_url, hub, quotas_file=quotas(tmp_path, "max_adapter_bytes = 1")) as client:
            with refused(TenantQuotaError, "max_adapter_bytes"):
                await resolve(client, f"hf:acme/n3@{COMMIT}")
            assert {new.name, same.name} <= set(await client.names())  # it would not fit without them either


async def test_what_no_request_names_is_deleted_and_resolved_anew(redis_url: str, hub: HubDouble) -> None:
    async with resolving(redis_url, hub, resolved_idle_s=0.4) as client:
        first = await resolve(client)

        async def is_gone() -> bool:
            return await client.names() == []

        await eventually(is_gone, what="the unused adapter is deleted")
        again = await resolve(client)
        assert (again.name, again.revision, again.is_new) == (first.name, first.revision, True)


async def test_beyond_the_budget_the_least_recently_used_goes(redis_url: str) -> None:
    with running_hub(hub_of(ManyHub)) as hub:
        async with resolving(redis_url, hub) as client:
            answers = [await resolve(client, f"hf:acme/n{n}@{COMMIT}") for n in range(3)]
            size = (await client.get(answers[0].name)).revision.canonical_bytes
            await resolve(client, f"hf:acme/n0@{COMMIT}")
        async with resolving(redis_url, hub, resolved_bytes=2 * size) as client:

            async def fits() -> bool:
                return await client.names() == sorted([answers[0].name, answers[2].name])

            await eventually(fits, what="two are left")


async def test_a_store_that_starts_with_narrower_rules_deletes_what_they_forbid(redis_url: str, hub: HubDouble) -> None:
    async with resolving(redis_url, hub) as client:
        red, blue = await resolve(client), await resolve(client, tenant="blue")
    async with resolving(redis_url, hub, "hf:acme/?tenant=blue") as client:

        async def is_blues() -> bool:
            return await client.names() == [blue.name]

        await eventually(is_blues, what="only blue's is left")
        with pytest.raises(AdapterForbiddenError):
            await resolve(client)
    assert red.name != blue.name


async def test_the_import_of_a_replica_that_died_is_taken_over(redis_url: str, hub: HubDouble) -> None:
    rule = ResolveRule.parse("hf:acme/")
    lease = keys.resolve_lease(source_key(rule, AskedSource.parse(SOURCE)))
    with redis.Redis.from_url(redis_url) as valkey:
        valkey.set(lease, "a replica that died", px=400)
    async with resolving(redis_url, hub) as client:
        began = time.monotonic()

        assert (await resolve(client)).is_new
        assert 0.2 < time.monotonic() - began < 10


async def test_what_is_there_is_found_while_all_places_are_taken(redis_url: str, slow: SlowHub) -> None:
    async with resolving(redis_url, slow, max_resolving=1) as client:
        slow.may_send.set()
        await resolve(client)
        slow.may_send.clear()
        slow.files = {f"more/{name}": data for name, data in slow.files.items()}
        waiting = asyncio.create_task(resolve(client, f"hf:acme/poet/more@{COMMIT}"))
        await eventually_asked(slow, 2)

        assert not (await resolve(client)).is_new
        slow.may_send.set()
        await waiting


async def test_weights_from_before_signatures_were_asked_for_are_given_to_no_further_tenant(
    redis_url: str, hub: HubDouble, tmp_path: Path
) -> None:
    async with resolving(redis_url, hub) as client:
        await resolve(client)
    trusted = tmp_path / "trusted.toml"
    trusted.write_text(trust_text({"default": "require"}, release=key("release")))
    async with resolving(redis_url, hub, trusted_signers=trusted) as client:
        with refused(AdapterUntrustedError, "not signed"):
            await resolve(client, tenant="blue")
