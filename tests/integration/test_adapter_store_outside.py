"""Adapters of embedding and lm_head over gRPC: stored, reported, given to engines, or refused for an engine's pool and room."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.adapter_image import layout, tile_values
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.token_rows import KIND_IDS, KIND_ROW_VALUES
from safetensors.numpy import load_file
from support.adapters import Recipe, adapter_config, adapter_tensors
from support.safetensors_files import safetensors_bytes
from support.store_engine_peer import attached_peer
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir, translated
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration
HEAD = "base_model.model.lm_head"


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[StoreClient]:
    async with running_rig(store_config(redis_url)) as (_, found):
        yield found


def saved_head(num_added: int = 0, changed: tuple[int, ...] = (3, 9)) -> tuple[dict[str, bytes], Any]:
    """Return an adapter that saves lm_head, and the matrix: some rows are not the base's, some are of added tokens."""
    recipe = Recipe(rank=2, targets=("q_proj",))
    matrix = load_file(tiny_base_dir() / "model.safetensors")["lm_head.weight"].astype(np.float32)
    matrix = np.vstack([matrix, np.ones((num_added, matrix.shape[1]), np.float32)])
    matrix[list(changed)] += 1
    tensors = adapter_tensors(load_base_model(tiny_base_dir()), recipe) | {f"{HEAD}.weight": matrix}
    config = adapter_config(recipe) | {"modules_to_save": ["lm_head"]}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": safetensors_bytes(tensors, "float32"),
    }, matrix


async def test_replaced_rows_are_stored_reported_and_given_to_an_engine(client: StoreClient) -> None:
    base = load_base_model(tiny_base_dir())
    files, matrix = saved_head(num_added=2)
    async with attached_peer(client.channel, base, max_added_tokens=2) as peer:
        revision = (await client.upload("a", files)).revision
        with translated():
            report = (await client.stub.GetAdapterReport(pb.GetAdapterReportRequest(name="a"))).report
        peer.want(revision.revision)
        await eventually(lambda: revision.revision in peer.images)

    assert revision.num_layers == base.num_layers
    assert list(revision.target_modules) == ["lm_head", "q_proj"]
    module = report.modules[-1]
    assert (module.layer, module.projection) == (base.num_layers, "lm_head")
    assert [(part.kind, part.size, part.HasField("norm")) for part in module.parts] == [("rows", 4, False)]
    assert module.parts[0].largest == pytest.approx(np.abs(matrix[[3, 9, -2, -1]]).max())
    assert list(report.notes.folded) == [
        f"lm_head: 2 of {base.vocab_size} rows differ from the base model's and are stored, and 2 of added tokens"
    ]
    geometry = base.geometry(dtype="float32", page_bytes=report.images[0].page_bytes)
    sizes = [(layer, "q_proj", "low_rank", 2) for layer in range(base.num_layers)]
    plan = layout(geometry, (*tuple(sizes), (base.num_layers, "lm_head", "rows", 4)))
    assert report.images[0].num_pages == plan.num_pages
    found = {
        kind: [
            tile_values(geometry, peer.images[revision.revision], tile) for tile in plan.tiles if tile["kind"] == kind
        ]
        for kind in (KIND_IDS, KIND_ROW_VALUES)
    }
    ids = [3, 9, base.vocab_size, base.vocab_size + 1]
    np.testing.assert_array_equal(np.concatenate(found[KIND_IDS], axis=1), [ids])
    np.testing.assert_array_equal(np.concatenate(found[KIND_ROW_VALUES]), matrix[ids])


async def test_rows_that_an_engines_pool_cannot_hold_are_refused_with_the_arithmetic(client: StoreClient) -> None:
    base = load_base_model(tiny_base_dir())
    every = tuple(range(base.vocab_size))
    async with attached_peer(client.channel, base, num_slots=1, page_bytes=16 * 1024):
        await client.upload("few", saved_head()[0])
        with refused(
            AdapterIncompatibleError, f"of which {base.vocab_size} rows of lm_head x {4 * base.hidden_size} bytes"
        ):
            await client.upload("all", saved_head(changed=every)[0])


async def test_tokens_beyond_an_engines_room_are_refused_with_its_flag(client: StoreClient) -> None:
    base = load_base_model(tiny_base_dir())
    async with attached_peer(client.channel, base, max_added_tokens=3):
        await client.upload("three", saved_head(num_added=3)[0])
        with refused(AdapterIncompatibleError, "--max-added-tokens 4"):
            await client.upload("four", saved_head(num_added=4)[0])
