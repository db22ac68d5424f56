"""Adapters of every method go from an upload to an engine's arena, and the engine learns first what they are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.canonical import canonicalise, read_canonical
from loraplex_common.adapter_image import LOW_RANK, AdapterSpec, ImageError, pack
from loraplex_common.adapter_parts import check_kinds
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.vectors import BIAS
from support.method_files import SETTINGS, method_config, method_tensors, read_method
from support.peft_methods import base_dir, base_info
from support.safetensors_files import safetensors_bytes
from support.store_engine_peer import attached_peer
from support.store_rig import StoreClient, running_rig, store_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[StoreClient]:
    config = store_config(redis_url, model=(base_dir("llama"), base_dir("qwen2")), model_alias=())
    async with running_rig(config) as (_, running):
        yield running


async def upload(client: StoreClient, method: str, base: str = "llama", **config: Any) -> str:
    """Upload one of the methods' adapters, with a trained bias if asked for, and return its revision."""
    tensors = method_tensors(base_info(base), method)
    if config.get("bias") == "all":
        tensors["base_model.model.model.layers.1.self_attn.k_proj.bias"] = np.full(32, 0.5, dtype=np.float32)
    files = {
        "adapter_config.json": method_config(method, **config),
        "adapter_model.safetensors": safetensors_bytes(tensors, "float32"),
    }
    return str((await client.upload(method, files, base_model=base)).revision.revision)


async def test_every_methods_image_arrives_whole_and_its_kinds_before_it(client: StoreClient) -> None:
    base = base_info("llama")
    revisions = {method: await upload(client, method) for method in SETTINGS}

    async with attached_peer(client.channel, base) as peer:
        for method, revision in revisions.items():
            form = canonicalise(read_method(base, method))
            adapter = read_canonical(b"".join(form.chunks()), form.revision)
            peer.want(revision)
            image = await peer.image(revision)
            offer = await peer.received("offer", revision)

            assert revision == form.revision
            assert AdapterSpec.from_json(offer.spec) == form.spec
            geometry = base.geometry(dtype="float32", page_bytes=image.shape[1])
            np.testing.assert_array_equal(image, pack(geometry, adapter.spec, adapter.tensors))
            if others := {kind for _, _, kind in adapter.tensors} - {LOW_RANK}:
                kind = "|".join(sorted(others))
                with pytest.raises(ImageError, match=f"does not compute parts of kind '({kind})'"):
                    check_kinds(AdapterSpec.from_json(offer.spec), (LOW_RANK,), "old")


async def test_a_trained_bias_is_stored_as_what_it_adds_to_the_bases_own(client: StoreClient) -> None:
    base = base_info("qwen2")
    revision = await upload(client, "lora", "qwen2", bias="all")

    async with attached_peer(client.channel, base) as peer:
        peer.want(revision)
        await peer.image(revision)
        spec = AdapterSpec.from_json((await peer.received("offer", revision)).spec)

    assert [(each.layer, each.projection) for each in spec.sizes if each.kind == BIAS] == [(1, "k_proj")]


async def test_a_method_that_is_not_served_is_refused_with_the_remedy(client: StoreClient) -> None:
    with pytest.raises(AdapterIncompatibleError, match=r'peft_type "LOHA" .* convert_to_lora'):
        await upload(client, "lora", peft_type="LOHA")
