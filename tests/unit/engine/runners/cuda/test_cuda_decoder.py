"""The CUDA backend's decoder with its kernels run on the CPU: the same launches as on a GPU, against the torch backend."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary
from kernels.kernel_cases import relative_error
from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weights import DTYPES, WeightReader
from loraplex_engine.runners.cuda import decoder
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.step import NO_ADAPTER
from loraplex_kernels.attention.scalar import AttentionScalar
from support.adapters import Recipe
from support.base_models import TinyBase, write_base_model
from support.engine_harness import recipe_adapter
from support.host_decoder import BUCKET, NUM_PAGES, NUM_SLOTS, HostRunner
from support.plans import Draw, Harness, Sequence_

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.pool_geometry import PoolGeometry
    from loraplex_engine.runners.cuda.step_input import StepInputs
    from loraplex_kernels.attention.paged_kv import KvLayout

BASE = TinyBase(hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1, head_dim=64, num_layers=2)
RECIPES = (Recipe(rank=4, seed=1), Recipe(rank=9, targets=("q_proj", "v_proj"), seed=2))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("decoder") / "base", BASE)


def load_all(harness: Harness, model_dir: Path, runner: HostRunner | TorchRunner) -> list[int]:
    info, indices = load_base_model(model_dir), []
    for number, recipe in enumerate(RECIPES):
        spec, tensors = recipe_adapter(info, recipe, f"{number:064x}")
        indices.append(harness.load(spec, pack(runner.geometry, spec, tensors)))
    return indices


def add_sequences(harness: Harness, indices: list[int]) -> list[Sequence_]:
    return [
        harness.add(range(5, 11), adapter=indices[0]),
        harness.add(range(40, 43), scale=0.5, adapter=indices[1], chunks=[2]),
        harness.add(range(2)),
    ]


def make_oracle(model_dir: Path, geometry: PoolGeometry) -> TorchRunner:
    limits = EngineLimits(pool=geometry, num_pages=NUM_PAGES, max_num_seqs=NUM_SLOTS, max_model_len=128)
    return TorchRunner(
        RunnerConfig(info=load_base_model(model_dir), limits=limits),
        WeightReader(model_dir, dtype=DTYPES[geometry.dtype], device=torch.device("cpu")),
    )


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
@pytest.mark.parametrize("max_rows_beside", [BUCKET, 0], ids=["beside", "in line"])
def test_prefill_mixed_and_padded_decode_steps_draw_what_the_torch_backend_draws(
    model_dir: Path, tmp_path: Path, max_rows_beside: int
) -> None:
    library = HostLibrary(torch.float32, tmp_path)
    own = HostRunner(model_dir, library, max_rows_beside=max_rows_beside)
    oracle = make_oracle(model_dir, own.pool_geometry)
    drawn = []

    for runner in (own, oracle):
        harness = Harness(runner, own.pool_geometry, NUM_PAGES)
        sequences = add_sequences(harness, load_all(harness, model_dir, runner))
        harness.step(sequences)
        late = harness.add(range(60, 62))
        harness.step([*sequences, late])
        harness.step([*sequences, late])
        harness.step([sequences[1], late])
        drawn.append([sequence.drawn for sequence in [*sequences, late]])

    assert drawn[0] == drawn[1]
    assert own.variants == [2, 1]
    oracle.close()


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
def test_fp8_keys_and_values_draw_what_they_draw_in_the_torch_backend(tmp_path: Path) -> None:
    """Eight KV heads, since pages below a tile's 32 KiB are refused on a GPU."""
    model_dir = write_base_model(tmp_path / "base", replace(BASE, num_heads=8, num_kv_heads=8))
    own = HostRunner(model_dir, HostLibrary(torch.float32, tmp_path), kv_dtype="fp8")
    oracle, drawn = make_oracle(model_dir, own.pool_geometry), []

    for runner in (own, oracle):
        harness = Harness(runner, own.pool_geometry, NUM_PAGES)
        sequences = add_sequences(harness, load_all(harness, model_dir, runner))
        harness.step(sequences)
        harness.step(sequences)
        harness.step(sequences)
        drawn.append([sequence.drawn for sequence in sequences])

    assert drawn[0] == drawn[1]
    kept = own.pool_geometry.values_bytes
    pages = (oracle._pool.pages != 0).any(-1) & (own.pool != 0).any(-1)
    assert pages.any()
    same = own.pool[pages][:, :kept] == oracle._pool.pages[pages][:, :kept]
    assert same.float().mean() > 0.999, "the same bytes but where a sum's last bit decides a rounding"
    oracle.close()


class ScalarAttention:
    """Attention in bf16 by the kernel of fp32, as that of decode rows does not run on a CPU."""

    def __init__(self, library: HostLibrary, layout: KvLayout, **sizes: object) -> None:
        del sizes
        self._kernel = AttentionScalar(library, layout)

    def launch(
        self, layer: int, pool: torch.Tensor, qkv: torch.Tensor, step: StepInputs, num_decode: int, out: torch.Tensor
    ) -> None:
        del num_decode
        self._kernel.launch(layer, pool, qkv, step.block_tables, step.sequences, step.positions, out)


def centred(logits: torch.Tensor) -> torch.Tensor:
    """What logits and log probabilities have in common."""
    return logits - logits.mean(-1, keepdim=True)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
def test_decode_rows_beside_chunks_have_the_torch_backends_logits_as_groups_and_as_segments(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "PagedAttention", ScalarAttention)
    library = HostLibrary(torch.bfloat16, tmp_path)
    groups, segments = (HostRunner(model_dir, library, min_decode_runs=minimum) for minimum in (2, 3))
    oracle = make_oracle(model_dir, groups.pool_geometry)
    logits: list[list[torch.Tensor]] = []

    for runner in (groups, segments, oracle):
        harness, found = Harness(runner, groups.pool_geometry, NUM_PAGES), list[torch.Tensor]()
        first, second = load_all(harness, model_dir, runner)
        draw, forced = Draw(num_logprobs=BASE.vocab_size), list(range(7, 20))
        rows = [
            harness.add(range(5 + row), adapter=adapter, scale=0.5 + row, draw=draw, forced=forced)
            for row, adapter in enumerate((first, NO_ADAPTER, second))
        ]
        late = [
            harness.add(range(40, 49), adapter=second, chunks=[1, 5], draw=draw, forced=forced),
            harness.add(range(60, 63), adapter=first, chunks=[2], draw=draw, forced=forced),
        ]
        harness.step(rows)
        for _ in range(3):
            result = harness.step([*rows, *late])
            if isinstance(runner, HostRunner):
                found.append(centred(runner.logits.float()))
                continue
            listed = torch.empty(len(result.slots), BASE.vocab_size)
            for row, entry in result.logprobs.items():
                listed[row, entry.token_ids[1:]] = torch.from_numpy(entry.logprobs[1:])
            found.append(centred(listed))
        logits.append(found)

    for own, other, expected in zip(*logits, strict=True):
        assert relative_error(own, expected) < 2e-2  # without LoRA 0.2
        assert relative_error(other, expected) < 2e-2
    assert not torch.equal(logits[0][0], logits[1][0]), "both took the same kernels"
    oracle.close()
