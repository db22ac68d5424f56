"""What an adapter brings besides weights, from import to collection: told, kept, counted, given out to gateways only."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import redis
from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store import wire
from loraplex_adapter_store.alias_update import AliasUpdate
from loraplex_adapter_store.records import AdapterRecord, AdapterView, Position, Revision
from loraplex_adapter_store.repository import keys
from loraplex_common import text_parts_wire
from loraplex_common.adapter_image import AdapterSpec, ImageError
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterNotFoundError, TenantQuotaError
from loraplex_common.text_parts import TextParts, TextPartsInfo
from support.adapter_texts import PIRATE, POET, files_with, pirate_texts
from support.adapters import Recipe, write_adapter
from support.hub_double import HubDouble, running_hub
from support.store_engine_peer import attached_peer
from support.store_rig import StoreClient, delete, refused, running_rig, store_config, tiny_base_dir, translated
from support.valkey import fresh_database
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration

KINDS = ["chat_template", "generation_defaults", "stop_tokens", "response_schema"]


async def parts_of(client: StoreClient, revision: str) -> TextParts:
    with translated():
        return text_parts_wire.from_message(await client.stub.GetTextParts(pb.GetTextPartsRequest(revision=revision)))


async def first_table(client: StoreClient, **fields: Any) -> list[Any]:
    call = client.stub.WatchAliases(pb.WatchAliasesRequest(**fields))
    try:
        return list((await call.read()).entries)
    finally:
        call.cancel()


async def test_an_import_says_what_it_brings_and_so_does_the_adapter(redis_url: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "pirate", tiny_base_dir())
    for name, data in pirate_texts().items():
        (folder / name).write_bytes(data)
    async with running_rig(store_config(redis_url, import_root=(tmp_path,))) as (_, client):
        uploaded = await client.upload("a", files_with(pirate_texts()))
        imported = await client.import_dir("b", folder)
        shown = await client.get("a")

        assert list(uploaded.revision.text_parts.kinds) == list(shown.revision.text_parts.kinds) == KINDS
        assert imported.revision == uploaded.revision
        parts = await parts_of(client, uploaded.revision.revision)

    assert (parts.chat_template, parts.special_tokens) == (PIRATE, {"eos_token": "<|im_start|>"})
    assert (dict(parts.generation), parts.stop_token_ids) == ({"temperature": 0.25, "top_k": 7}, (2, 9))
    assert json.loads(parts.response_schema)["properties"] == {"role": {"const": "assistant"}}
    assert parts.digest == uploaded.revision.text_parts.digest


async def test_texts_make_another_revision_and_copies_of_the_bases_do_not(redis_url: str) -> None:
    async with running_rig(store_config(redis_url)) as (_, client):
        plain = (await client.upload_recipe("plain")).revision
        copied = await client.upload("copied", files_with(_base_texts()))
        own = (await client.upload("own", files_with({"chat_template.jinja": POET.encode()}))).revision
        other = (await client.upload("other", files_with({"chat_template.jinja": PIRATE.encode()}))).revision

        assert copied.revision == plain
        assert len({plain.revision, own.revision, other.revision}) == 3
        assert not plain.HasField("text_parts")
        assert await parts_of(client, plain.revision) == TextParts()
        assert own.canonical_bytes > plain.canonical_bytes + len(POET)


def _base_texts() -> dict[str, bytes]:
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    files = {name: tiny_base_dir() / name for name in names}
    texts = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    template = json.loads(texts["tokenizer_config.json"])["chat_template"]
    return texts | {"chat_template.jinja": template.encode() + b"\n"}


async def test_an_image_of_an_adapter_with_texts_is_that_of_its_weights(redis_url: str) -> None:
    async with running_rig(store_config(redis_url)) as (_, client):
        plain = (await client.upload_recipe("plain")).revision.revision
        own = (await client.upload("own", files_with(pirate_texts()))).revision.revision
        async with attached_peer(client.channel, load_base_model(tiny_base_dir())) as peer:
            images = []
            for digest in (plain, own):
                peer.want(digest)
                images.append(await peer.image(digest))

    assert images[0].tobytes() == images[1].tobytes()


async def test_texts_are_there_after_a_restart_and_gone_with_the_revision(redis_url: str) -> None:
    async with running_rig(store_config(redis_url)) as (_, client):
        digest = (await client.upload("a", files_with(pirate_texts()))).revision.revision
    async with running_rig(store_config(redis_url)) as (_, client):
        assert (await parts_of(client, digest)).chat_template == PIRATE
        assert list((await client.get("a")).revision.text_parts.kinds) == KINDS

        await delete(client, "a")
        valkey = redis.Redis.from_url(redis_url)
        await eventually(lambda: not valkey.exists(keys.manifest(digest), keys.text_parts(digest)))
        with refused(AdapterNotFoundError, "does not exist"):
            await parts_of(client, digest)
        valkey.close()


async def test_the_feed_names_texts_by_their_digest_and_old_watchers_get_none_of_such_revisions(redis_url: str) -> None:
    async with running_rig(store_config(redis_url)) as (_, client):
        own = (await client.upload("a", files_with(pirate_texts()))).revision
        told = await first_table(client, uses_text_parts=True)
        untold = await first_table(client)

    assert [revision.text_parts.digest for revision in told[0].revisions] == [own.text_parts.digest]
    assert (list(untold[0].revisions), untold[0].aliases[0].label) == ([], "latest")


def test_texts_cost_the_feed_of_10000_adapters_some_130_bytes_each() -> None:
    template = "{{ messages }}" * 4600  # 64 KB
    info = TextParts(chat_template=template, stop_token_ids=(2,)).info

    plain, own = _feed_bytes(None), _feed_bytes(info)

    assert own - plain < 150 * 10_000
    assert own < 10 * 2**20


def _feed_bytes(info: TextPartsInfo | None) -> int:
    """Return the size of a table of 10,000 names, one revision each, as gateways get it."""
    views = []
    for number in range(10_000):
        digest = f"{number:064x}"
        revision = Revision(
            revision=digest, name=f"adapter-{number}", base_fingerprint="ab" * 32, max_rank=16, num_parameters=10**7,
            canonical_bytes=2 * 10**7, target_modules=("q_proj", "v_proj"), num_layers=32, source="upload", create_time=1.0,
            text_parts=info,
        )  # fmt: skip
        record = AdapterRecord(name=revision.name, labels={"latest": digest}, revisions=(digest,), version=1)
        views.append(AdapterView(record, (revision,)))
    parts = [tuple(views[start : start + 50]) for start in range(0, len(views), 50)]
    return sum(wire.alias_update(AliasUpdate(Position("x", 1), part)).ByteSize() for part in parts)


async def test_a_store_that_knows_no_texts_reads_the_names_and_refuses_the_adapter(redis_url: str) -> None:
    async with running_rig(store_config(redis_url)) as (_, client):
        digest = (await client.upload("a", files_with(pirate_texts()))).revision.revision
    valkey = redis.Redis.from_url(redis_url)
    record: Any = valkey.get(keys.revision(digest))
    spec: Any = valkey.hget(keys.manifest(digest), "spec")
    valkey.close()

    # As its `Revision.from_json` and `Manifest.from_fields` do.
    fields = json.loads(record)
    assert Revision(**{**fields, "target_modules": tuple(fields["target_modules"])}).revision == digest
    with pytest.raises(ImageError, match=r"part kind 'text_parts' is not one of low_rank, .*: upgrade the older side"):
        AdapterSpec.from_json(spec)


async def test_two_imports_at_once_of_one_folder_bring_the_same(redis_url: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "poet", tiny_base_dir(), Recipe(seed=3))
    (folder / "chat_template.jinja").write_text(POET)
    async with running_rig(store_config(redis_url, import_root=(tmp_path,))) as (_, client):
        results = await asyncio.gather(*(client.import_dir(f"poet-{n}", folder) for n in range(3)))

    assert {tuple(result.revision.text_parts.kinds) for result in results} == {("chat_template",)}


async def test_texts_count_as_a_tenants_bytes(redis_url: str, tmp_path: Path) -> None:
    plain, own = files_with({}), files_with({"chat_template.jinja": POET.encode() + b"{# " + b"x" * 4000 + b" #}"})
    async with running_rig(store_config(redis_url)) as (_, client):
        size = (await client.upload("measured", plain)).revision.canonical_bytes
    quotas = tmp_path / "quotas.toml"
    quotas.write_text(f"[tenants.acme]\nmax_adapter_bytes = {size + 1000}\n")
    async with running_rig(store_config(redis_url, quotas_file=quotas)) as (_, client):
        adapter = adapter_pb2.Adapter(name="a", allowed_tenants=["acme"])
        await client.stub.CreateAdapter(pb.CreateAdapterRequest(adapter=adapter))
        with refused(TenantQuotaError, "max_adapter_bytes"):
            await client.upload("a", own)

        assert (await client.upload("a", plain)).revision.canonical_bytes == size


async def test_texts_come_from_the_hub_as_from_a_folder(store_valkey: EmbeddedValkey) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = HubDouble("org/pirate", commit, files_with(pirate_texts()))
    with running_hub(hub):
        async with running_rig(store_config(fresh_database(store_valkey), hf_endpoint=hub.url)) as (_, client):
            source = pb.HuggingFaceSource(repo="org/pirate", revision=commit)
            result = await client.wait(await client.stub.ImportAdapter(pb.ImportAdapterRequest(name="a", hf=source)))
            uploaded = await client.upload("b", files_with(pirate_texts()))

    assert list(result.revision.text_parts.kinds) == KINDS
    assert result.revision.revision == uploaded.revision.revision
