"""Steps of the CUDA backend whose rows add several weighted adapters up, kernels on the CPU, against the plain formula."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary
from kernels.kernel_cases import relative_error
from loraplex_common.adapter_image import pack
from loraplex_engine.runners.cuda.part_variants import NO_GRAPH, PART_VARIANTS
from loraplex_engine.runners.cuda.row_terms import row_passes, rows_of, token_terms
from loraplex_engine.step import MoreAdapters
from support.base_models import TinyBase, write_base_model
from support.host_decoder import BUCKET, NUM_PAGES, HostRunner
from support.list_plans import ListHarness
from support.part_adapters import FAMILIES, SummedPath, random_adapter
from support.row_plans import make_plan

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.runners.cuda.lora_paths import BasePath, LayerPath
    from loraplex_engine.step import StepPlan
    from support.part_adapters import PartAdapter

BASE: Final = TinyBase(
    architecture="qwen2", hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1, head_dim=64, num_layers=1
)
CHAINS: Final = 3 + len(PART_VARIANTS)
"""The variant behind those of plain LoRA and of other parts."""


class Steps:
    """Runs sequences of lists of adapters, by the engine's paths or by the plain formula."""

    def __init__(
        self, model_dir: Path, tmp_path: Path, families: list[str], *, is_plain: bool, rows_beside: int = BUCKET
    ) -> None:
        self.runner = HostRunner(model_dir, HostLibrary(torch.float32, tmp_path), max_rows_beside=rows_beside)
        self.harness = ListHarness(self.runner, self.runner.pool_geometry, NUM_PAGES)
        self.adapters: dict[int, PartAdapter] = {}
        for number, family in enumerate(families):
            adapter = random_adapter(self.runner.geometry, FAMILIES[family], number)
            image = pack(self.runner.geometry, adapter.spec, adapter.tensors)
            self.adapters[self.harness.load(adapter.spec, image)] = adapter
        if is_plain:
            self.runner.instead = self._plain

    def _plain(self, plan: StepPlan, path: BasePath) -> LayerPath:
        del path
        return SummedPath.of_plan_with_lists(self.runner.decoder.followers, self.runner.geometry, self.adapters, plan)

    def logits(self, lists: list[list[tuple[int, float]]], num_steps: int = 3) -> list[torch.Tensor]:
        """Step together sequences with these (adapter, scale) each; return each step's logits."""
        rows = [
            self.harness.add_list(
                range(10 * number, 10 * number + 5), adapters, chunks=[3] * (number % 2), forced=[7, 8, 9]
            )
            for number, adapters in enumerate(lists)
        ]
        found = []
        for _ in range(num_steps):
            self.harness.step(rows)
            found.append(self.runner.logits.clone())
        return found


LISTS: Final[list[list[tuple[int, float]]]] = [
    [(0, 0.5), (1, 1.5), (2, -1.0)],
    [(2, 1.0)],
    [(0, 0.5), (1, 1.5), (2, -1.0)],
    [(1, 2.0), (0, 1.0)],
]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
@pytest.mark.parametrize(
    ("families", "variants", "rows_beside"),
    [
        (["LoRA"] * 3, {CHAINS}, BUCKET),
        (["LoRA"] * 3, {CHAINS}, 0),
        (["LoRA", "lora_bias", "SHiRA"], {NO_GRAPH}, BUCKET),
    ],
    ids=["pairs, beside products", "pairs, in line", "b and S, in passes"],
)
def test_prompts_and_decode_rows_have_the_logits_of_the_weighted_sum(
    tmp_path: Path, families: list[str], variants: set[int], rows_beside: int
) -> None:
    model_dir = write_base_model(tmp_path / "base", BASE)
    found, plain = (
        Steps(model_dir, tmp_path, families, is_plain=is_plain, rows_beside=rows_beside) for is_plain in (False, True)
    )

    for own, expected in zip(found.logits(LISTS), plain.logits(LISTS), strict=True):
        assert relative_error(own, expected) < 2e-4
    assert set(found.runner.variants) == variants


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
def test_steps_without_several_adapters_take_the_graphs_that_they_took(tmp_path: Path) -> None:
    model_dir = write_base_model(tmp_path / "base", BASE)
    steps = Steps(model_dir, tmp_path, ["LoRA", "LoRA"], is_plain=False)

    steps.logits([[(0, 1.0)], [(1, 1.0)], []])

    assert set(steps.runner.variants) == {2}


def test_large_ranks_take_the_graph_of_chains_and_beside_other_parts_no_graph(tmp_path: Path) -> None:
    model_dir = write_base_model(tmp_path / "base", BASE)
    runner = Steps(model_dir, tmp_path, ["LoRA", "LoRA", "lora_bias"], is_plain=False).runner
    plain, wide, mixed = (np.array(adapters, dtype=np.int32) for adapters in ([0, 0], [0, 1], [1, 2]))
    more = MoreAdapters(
        rows=np.array([1], dtype=np.int32), adapters=np.array([2], dtype=np.int32), scales=np.ones(1, dtype=np.float32)
    )
    assert runner.lora.prepare(wide, BUCKET, 1) == 2

    runner.tables.is_wide[1] = True

    assert runner.lora.prepare(plain, BUCKET, 2) == 2
    assert runner.lora.prepare(wide, BUCKET, 2) == CHAINS
    assert runner.lora.prepare(mixed, BUCKET, 2) == NO_GRAPH
    assert runner.lora.prepare(plain, BUCKET, 2, more=more) == NO_GRAPH
    assert runner.lora.prepare(np.array([2, 0], dtype=np.int32), BUCKET, 2) == 3


def lists_plan() -> StepPlan:
    more = MoreAdapters(
        rows=np.array([0, 0, 2], dtype=np.int32),
        adapters=np.array([3, 1, 0], dtype=np.int32),
        scales=np.array([0.5, 2, 3], dtype=np.float32),
    )
    return replace(make_plan([2, -1], [(2, 1), (1, 3)]), more_adapters=more)


def test_terms_of_a_rows_tokens_keep_the_order_of_its_list() -> None:
    terms = token_terms(lists_plan())

    assert terms.places.tolist() == [0, 0, 0, 2, 2, 3, 3, 4]
    assert terms.adapters.tolist() == [2, 3, 1, 1, 0, 1, 0, 3]
    assert terms.scales.tolist() == [1, 0.5, 2, 1, 3, 1, 3, 1]
    assert terms.num_rows == 5


def test_a_pass_has_one_place_of_the_lists() -> None:
    more = lists_plan().more_adapters

    assert [each.adapters.tolist() for each in row_passes(more, 4)] == [[3, -1, 0, -1], [1, -1, -1, -1]]
    assert [each.scales.tolist() for each in row_passes(more, 4)] == [[0.5, 0, 3, 0], [2, 0, 0, 0]]
    assert [each.adapters.tolist() for each in row_passes(rows_of(more, 1, 4), 4)] == [[-1, -1, 0, -1]]
