"""Reports over gRPC, from a real store with a real engine attached."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.repository import keys
from loraplex_common.adapter_image import layout
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterNotFoundError, InvalidParameterError
from loraplex_common.valkey import connect
from safetensors.numpy import load_file
from support.adapter_line import ScriptedStore, close, make_line
from support.adapters import Recipe, adapter_files, adapter_tensors, module_name
from support.method_files import method_config, method_tensors
from support.safetensors_files import safetensors_bytes
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir, translated
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_adapter_store.service import RunningStore

pytestmark = pytest.mark.integration
RECIPE = Recipe(rank=4, alpha=6, rank_pattern={"v_proj": 2}, targets=("q_proj", "v_proj", "down_proj"))


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[tuple[RunningStore, StoreClient]]:
    async with running_rig(store_config(redis_url)) as running:
        yield running


async def report_on(client: StoreClient, name: str) -> Any:
    with translated():
        return (await client.stub.GetAdapterReport(pb.GetAdapterReportRequest(name=name))).report


@asynccontextmanager
async def attached_engine(store: RunningStore) -> AsyncIterator[None]:
    line = make_line(tiny_base_dir(), f"127.0.0.1:{store.grpc_port}", ScriptedStore(), wait_s=20)  # type: ignore[abstract]
    task = asyncio.create_task(line.client.run())
    try:
        await eventually(lambda: "e1" in store.attached)
        yield
    finally:
        await close(line, task)


async def test_norms_are_relative_to_the_weights_that_a_real_engine_serves(
    rig: tuple[RunningStore, StoreClient],
) -> None:
    store, client = rig
    await client.upload_recipe("a", RECIPE)
    base = load_base_model(tiny_base_dir())
    weights: dict[str, Any] = {}
    for file in tiny_base_dir().glob("*.safetensors"):
        weights |= load_file(file)

    async with attached_engine(store):
        report = await report_on(client, "a")
    after = await report_on(client, "a:latest")

    tensors = adapter_tensors(base, RECIPE)
    assert len(report.modules) == 3 * base.num_layers
    for module in report.modules:
        name = module_name(module.layer, module.projection)
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        norm = float(np.linalg.norm(RECIPE.scaling_of(name) * b @ a))
        own = float(np.linalg.norm(weights[f"{name}.weight"].astype(np.float64)))
        (part,) = module.parts
        assert (part.kind, part.size) == ("low_rank", RECIPE.rank_of(name))
        assert part.scale == pytest.approx(RECIPE.scaling_of(name))
        assert part.norm == pytest.approx(norm, rel=1e-6)
        assert module.base_norm == pytest.approx(own, rel=1e-5)
        assert part.relative_norm == pytest.approx(norm / own, rel=1e-5)
    (image,) = report.images
    geometry = base.geometry(dtype=image.dtype, page_bytes=image.page_bytes)
    sizes = tuple((m.layer, m.projection, p.kind, p.size) for m in report.modules for p in m.parts)
    assert (image.num_pages, image.problem) == (layout(geometry, sizes).num_pages, "")
    assert image.num_bytes == image.num_pages * image.page_bytes
    assert after.modules == report.modules  # what an engine has reported of a base holds without it
    assert list(after.images) == []


async def test_without_an_engine_that_has_reported_nothing_is_said_of_the_base(
    rig: tuple[RunningStore, StoreClient],
) -> None:
    _, client = rig
    revision = (await client.upload_recipe("a", RECIPE)).revision
    async with attached_peer(client.channel, load_base_model(tiny_base_dir())):
        report = await report_on(client, "a")

    assert report.revision == revision
    assert not any(module.HasField("base_norm") for module in report.modules)
    assert not any(part.HasField("relative_norm") for module in report.modules for part in module.parts)
    assert len(report.images) == 1


async def test_the_import_is_told_of_later_and_old_revisions_say_that_it_was_not_recorded(
    redis_url: str, rig: tuple[RunningStore, StoreClient]
) -> None:
    _, client = rig
    tensors = adapter_tensors(load_base_model(tiny_base_dir()), RECIPE)
    renamed = {name.replace(".weight", ".default.weight"): values for name, values in tensors.items()}
    files = adapter_files(tiny_base_dir(), RECIPE)
    files["adapter_model.safetensors"] = safetensors_bytes(renamed, "float32")
    uploaded = await client.upload("a", files)

    notes = (await report_on(client, "a")).notes
    valkey = connect(redis_url)
    await valkey.hdel(keys.manifest(uploaded.revision.revision), "notes")
    await valkey.aclose()
    forgotten = await report_on(client, "a")
    await client.upload("a", files)
    again = await report_on(client, "a")

    assert (notes.method, len(notes.rules)) == ("LORA", 1)
    assert "read as PEFT writes it" in notes.rules[0]
    assert [*notes.rules, *notes.warnings] == sorted(uploaded.warnings, key=lambda each: each not in notes.rules)
    assert not forgotten.HasField("notes")
    assert again.notes == notes


async def test_folding_and_invocation_tokens_are_in_the_report(rig: tuple[RunningStore, StoreClient]) -> None:
    _, client = rig
    base = load_base_model(tiny_base_dir())
    files = {
        method: {
            "adapter_config.json": method_config(method, **config),
            "adapter_model.safetensors": safetensors_bytes(method_tensors(base, method), "float32"),
        }
        for method, config in {"vera": {}, "lora": {"alora_invocation_tokens": [7, 8]}}.items()
    }
    for method, content in files.items():
        await client.upload(method, content)

    vera, activated = await report_on(client, "vera"), await report_on(client, "lora")

    assert vera.notes.method == "VERA"
    assert "multiplied into the rows of the shared matrices" in vera.notes.folded[0]
    assert list(activated.invocation_token_ids) == [7, 8]
    assert list(activated.revision.text_parts.kinds) == ["invocation_tokens"]


async def test_an_exploding_delta_is_warned_of_against_the_norms_that_engines_report(
    rig: tuple[RunningStore, StoreClient],
) -> None:
    _, client = rig
    base = load_base_model(tiny_base_dir())
    count = sum(len(layer) for layer in base.layers)
    before = await client.upload_recipe("a", RECIPE)
    async with attached_peer(client.channel, base, weight_norms=[1e-3] * count):
        with_norms = await client.upload_recipe("b", Recipe(rank=4, targets=("q_proj",), seed=1))

    assert not any("drowns" in warning for warning in before.warnings)
    (told,) = [warning for warning in with_norms.warnings if "drowns" in warning]
    assert f"in {base.num_layers} modules: model.layers.0.self_attn.q_proj, " in told
    assert list((await report_on(client, "b")).notes.warnings).count(told) == 1


async def test_an_engine_that_reports_too_few_norms_is_refused(rig: tuple[RunningStore, StoreClient]) -> None:
    _, client = rig
    base = load_base_model(tiny_base_dir())
    peer = EnginePeer(base, base.geometry(dtype="float32", page_bytes=2**16), num_slots=4, engine_id="e")
    try:
        with refused(InvalidParameterError, "2 norms for 14 projections"), translated():
            await client.stub.AttachEngine(peer.requests(peer.hello(weight_norms=[1.0, 2.0]))).read()
    finally:
        peer.close()


async def test_a_name_without_a_revision_has_no_report(rig: tuple[RunningStore, StoreClient]) -> None:
    _, client = rig
    with refused(AdapterNotFoundError, "does not exist"):
        await report_on(client, "nothing")


async def test_reports_at_once_are_measured_one_after_the_other_and_agree(
    rig: tuple[RunningStore, StoreClient],
) -> None:
    _, client = rig
    for seed in range(3):
        await client.upload_recipe(f"a{seed}", Recipe(rank=4, seed=seed))

    reports = await asyncio.gather(*(report_on(client, f"a{number % 3}") for number in range(9)))

    for number, report in enumerate(reports):
        assert report == reports[number % 3]
    assert len({json.dumps([part.norm for part in report.modules[0].parts]) for report in reports}) == 3
