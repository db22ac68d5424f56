"""Steps of the CUDA backend whose adapters have every kind of part, kernels on the CPU, against the plain formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary
from kernels.kernel_cases import relative_error
from loraplex_common.adapter_image import pack
from loraplex_engine.runners.cuda.part_variants import NO_GRAPH, PART_VARIANTS, PartVariant, part_variant_of
from support.base_models import TinyBase, write_base_model
from support.host_decoder import NUM_PAGES
from support.host_parts import PartRunner
from support.part_adapters import FAMILIES, PlainPath, random_adapter
from support.plans import Harness

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.runners.cuda.lora_paths import BasePath, LayerPath
    from loraplex_engine.step import StepPlan
    from support.part_adapters import PartAdapter

BASE = TinyBase(
    architecture="qwen2", hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1, head_dim=64, num_layers=1
)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
@pytest.mark.parametrize(
    ("families", "variants"),
    [
        (["DoRA", "lora_bias", None, "LoRA"], {3}),
        (["(IA)3", None, "(IA)3"], {4}),
        (["SHiRA", "SHiRA", None], {5}),
        (["everything", "(IA)3", "DoRA", "LoRA"], {6}),
        (["FLoRA", "FLoRA", None], {NO_GRAPH}),
        (["FLoRA", "(IA)3", "everything", "FLoRA"], {NO_GRAPH}),
    ],
    ids=["c and b with pairs", "e and c", "sparse", "all", "FLoRA", "all and FLoRA"],
)
def test_prompts_and_decode_rows_of_any_parts_have_the_logits_of_the_plain_formula(
    tmp_path: Path,
    families: list[str | None],
    variants: set[int],
) -> None:
    model_dir = write_base_model(tmp_path / "base", BASE)
    steps: list[list[torch.Tensor]] = []

    for is_plain in (False, True):
        runner = PartRunner(model_dir, HostLibrary(torch.float32, tmp_path))
        harness = Harness(runner, runner.pool_geometry, NUM_PAGES)
        adapters: dict[int, PartAdapter] = {}
        rows = []
        for number, family in enumerate(families):
            index = -1
            if family is not None:
                adapter = random_adapter(runner.geometry, FAMILIES[family], number)
                index = harness.load(adapter.spec, pack(runner.geometry, adapter.spec, adapter.tensors))
                adapters[index] = adapter
            scale = 0.5 if family in ("SHiRA", "lora_bias") else 1.0
            chunks = [3] * (number % 2)
            rows.append(
                harness.add(
                    range(10 * number, 10 * number + 5), adapter=index, scale=scale, chunks=chunks, forced=[7, 8, 9]
                )
            )
        if is_plain:

            def plain(
                plan: StepPlan,
                path: BasePath,
                runner: PartRunner = runner,
                adapters: dict[int, PartAdapter] = adapters,
            ) -> LayerPath:
                del path
                return PlainPath.of_plan(runner.decoder.followers, runner.geometry, adapters, plan)

            runner.instead = plain
        for _ in range(3):
            harness.step(rows)
        steps.append(runner.steps)
        assert set(runner.variants) == variants
        runner.magnitudes.close()

    assert len(steps[0]) == 3
    for own, expected in zip(*steps, strict=True):
        assert relative_error(own, expected) < 2e-4


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        (PartVariant(has_pairs=True, finishes=True), 0),
        (PartVariant(finishes=True), 0),
        (PartVariant(scales_inputs=True), 1),
        (PartVariant(has_sparse=True), 2),
        (PartVariant(has_pairs=True, has_sparse=True), 3),
        (PartVariant(has_pairs=True, scales_inputs=True), 3),
        (PART_VARIANTS[-1], 3),
        (PartVariant(has_flora=True), NO_GRAPH),
    ],
)
def test_a_batch_gets_the_smallest_variant_with_all_its_parts(needed: PartVariant, expected: int) -> None:
    assert part_variant_of(needed) == expected
