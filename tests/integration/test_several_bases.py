"""An adapter serves on further base models by an operator's word, and on each as that one's own revision."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_client import AsyncClient, Client
from loraplex_client.adapter_apply import Applier
from loraplex_client.adapter_manifest import read_manifest
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import (
    AdapterIncompatibleError,
    InvalidParameterError,
    LoraplexError,
    ModelNotFoundError,
    NoEngineError,
)
from support.adapters import Recipe, adapter_files, write_adapter
from support.base_models import TinyBase, write_base_model
from support.lone_engine import running_engine
from support.processes import ServiceProcess
from support.store_rig import delete, other_base_dir, refused, running_rig, set_alias, store_config, tiny_base_dir
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex.v1 import adapter_pb2
    from support.store_rig import StoreClient

pytestmark = pytest.mark.integration
FILES: Final[dict[str, Any]] = {"base_model": "tiny", "also_base_models": ["rounded"]}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in another stored form."""
    return write_base_model(tmp_path_factory.mktemp("bases") / "rounded", TinyBase(dtype="bfloat16"))


@pytest.fixture
async def store(redis_url: str, rounded: Path) -> AsyncIterator[StoreClient]:
    async with running_rig(store_config(redis_url, model=(tiny_base_dir(), rounded, other_base_dir()))) as (_, client):
        yield client


def counterparts(adapter: adapter_pb2.Adapter) -> list[tuple[str, str, str]]:
    return [(each.revision, each.base_model, each.counterpart) for each in adapter.counterparts]


async def test_each_base_has_the_revision_that_an_import_for_it_alone_gives(store: StoreClient, rounded: Path) -> None:
    files = adapter_files(tiny_base_dir(), Recipe())
    alone = await store.upload("alone", files, base_model="rounded")
    both = await store.upload("both", files, **FILES)

    assert alone.revision.base_fingerprint == load_base_model(rounded).fingerprint
    assert both.revision.base_fingerprint == load_base_model(tiny_base_dir()).fingerprint
    assert counterparts(both.adapter) == [(both.revision.revision, "rounded", alone.revision.revision)]
    assert {each.label: each.revision for each in both.adapter.aliases} == {"latest": both.revision.revision}

    await delete(store, "alone")  # what the counterpart refers to is not collected
    moved = await set_alias(store, "both", "prod", both.revision.revision)
    assert counterparts(moved.adapter) == counterparts(both.adapter)
    later = await store.upload("both", files, base_model="tiny")
    assert counterparts(later.adapter) == []


@pytest.mark.parametrize(
    ("also", "error", "match"),
    [
        (["other"], AdapterIncompatibleError, "for the further base model other: "),
        (["rounded", "other"], AdapterIncompatibleError, "for the further base model other: "),
        (["nowhere"], ModelNotFoundError, "'nowhere' is not known here; known: tiny"),
        (["tiny"], InvalidParameterError, "'tiny' is the same base model as the one that the adapter is for"),
        ([""], InvalidParameterError, "is empty"),
        (["rounded", "Rounded"], InvalidParameterError, "named twice: rounded, Rounded"),
        ([f"base-{number}" for number in range(9)], InvalidParameterError, "9 further base models, at most 8"),
    ],
)
async def test_a_base_that_does_not_fit_refuses_the_import_and_leaves_nothing(
    store: StoreClient, also: list[str], error: type[LoraplexError], match: str
) -> None:
    with refused(error, match):
        await store.upload_recipe("both", base_model="tiny", also_base_models=also)

    assert await store.names() == []


async def test_what_was_stored_for_further_bases_is_taken_back_if_the_label_has_moved(store: StoreClient) -> None:
    first = await store.upload_recipe("both", base_model="tiny")

    with refused(LoraplexError, "points at"):
        await store.upload_recipe("both", Recipe(seed=5), expected_revision="", **FILES)

    assert (await store.get("both")).adapter.latest.revision == first.revision.revision
    revisions = await store.stub.ListAdapterRevisions(pb.ListAdapterRevisionsRequest(name="both"))
    assert [each.revision for each in revisions.revisions] == [first.revision.revision]


async def test_a_file_says_on_which_bases_and_a_second_time_nothing_is_done(
    redis_url: str, rounded: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "one", tiny_base_dir(), Recipe())
    file = tmp_path / "adapters.yaml"
    async with running_rig(store_config(redis_url, model=(tiny_base_dir(), rounded))) as (running, store):

        def apply(text: str) -> list[str]:
            file.write_text("adapters: {both: {source: one, base_model: tiny" + text + "}}")
            said: list[str] = []
            with Client("127.0.0.1:1", store_target=f"127.0.0.1:{running.grpc_port}") as client:
                Applier(client.adapters, said.append, is_dry=False, prunes=False).apply(read_manifest(file))
            return [line.partition(", latest")[0].partition(" /")[0] for line in said]

        assert await asyncio.to_thread(apply, "") == ["both: create", "both: import"]
        assert await asyncio.to_thread(apply, ", also_base_models: [rounded]") == ["both: serve on rounded"]
        assert await asyncio.to_thread(apply, ", also_base_models: [rounded]") == []
        assert [each.base_model for each in (await store.get("both")).adapter.counterparts] == ["rounded"]
        assert await asyncio.to_thread(apply, "") == ["both: serve on its own base"]
        for wrong in ("rounded", "[1]", "['']"):
            with refused(InvalidParameterError, "also_base_models is no list of names"):
                await asyncio.to_thread(apply, f", also_base_models: {wrong}")


async def test_a_gateway_of_a_further_base_serves_the_adapter_as_that_bases_revision(
    tmp_path: Path, valkey_url: str, rounded: Path
) -> None:
    (tmp_path / "tiny").symlink_to(rounded)  # where `running_engine` looks
    config = store_config(valkey_url, model=(tiny_base_dir(), rounded))
    ports = (
        "--port",
        "0",
        "--http-port",
        "0",
        "--metrics-port",
        "0",
        "--redis-url",
        valkey_url,
        "--drain-settle-s",
        "0",
    )
    async with running_rig(config) as (running, store):
        both = await store.upload_recipe("both", **FILES)
        plain = await store.upload_recipe("plain", base_model="tiny")
        address = ("--store-target", f"127.0.0.1:{running.grpc_port}")
        with running_engine(tmp_path, "--redis-url", valkey_url, *address):
            models = ("--model", str(tiny_base_dir()), "--model", str(rounded))
            gateway = ServiceProcess("loraplex_gateway", [*models, *address, *ports], log_dir=tmp_path)
            gateway.wait_ready()
            async with AsyncClient(gateway.grpc) as client:

                async def answer(adapter: str) -> Any:
                    return await client.generate_once(
                        prompt_token_ids=[5, 6, 7], model="rounded", adapter=adapter, max_new_tokens=8, temperature=0
                    )

                async def is_served() -> bool:
                    try:
                        return bool(await answer(""))
                    except NoEngineError:
                        return False

                await eventually(is_served, what="the engine found")
                done = await answer("both")
                with refused(AdapterIncompatibleError, "another base model, not for rounded.*--also-base"):
                    await answer("plain")
            assert gateway.stop() == 0
    assert done.started.adapter_revision == both.adapter.counterparts[0].counterpart
    assert plain.revision.revision == both.revision.revision
