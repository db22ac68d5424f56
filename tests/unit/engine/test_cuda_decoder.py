"""The CUDA backend's decoder with its kernels run on the CPU: the same launches as on a GPU, against the torch backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary
from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.cuda.decode_lora import DecodeLora
from loraplex_engine.cuda.decoder import CudaDecoder, DecoderLimits
from loraplex_engine.cuda.lora_paths import AddedLoraPath, BasePath
from loraplex_engine.cuda.step_input import InputLayout, InputWriter, StepShape, is_pure_decode
from loraplex_engine.cuda.token_lora import GroupedLora
from loraplex_engine.model.config import model_config
from loraplex_engine.model.llama import LlamaModel
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.step import StepResult
from loraplex_engine.torch_runner import RunnerConfig, TorchRunner
from loraplex_kernels.tables import AdapterTables
from support.adapters import Recipe
from support.base_models import TinyBase, write_base_model
from support.engine_harness import recipe_adapter
from support.plans import Harness, Sequence_

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_engine.cuda.lora_paths import LayerPath
    from loraplex_engine.step import StepPlan
    from numpy.typing import NDArray

BASE = TinyBase(hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1, head_dim=64, num_layers=2)
NUM_PAGES, NUM_SLOTS, BUCKET = 96, 8, 4
RECIPES = (Recipe(rank=4, seed=1), Recipe(rank=9, targets=("q_proj", "v_proj"), seed=2))
CPU = torch.device("cpu")


class Done:
    """A handle or load that is done already."""

    def __init__(self, result: StepResult | None = None) -> None:
        self._result = result

    def is_done(self) -> bool:
        return True

    def wait(self) -> StepResult:
        assert self._result is not None
        return self._result

    def add_done_callback(self, callback: object) -> None:
        callback()  # type: ignore[operator]


class HostRunner:
    """`CudaRunner` without streams and graphs: decode steps padded to a bucket, others as they are."""

    pipeline_depth = 1

    def __init__(self, model_dir: Path, library: HostLibrary, max_rows_beside: int) -> None:
        info = load_base_model(model_dir)
        self.pool_geometry = choose_pool_geometry(info, dtype="float32")
        self.geometry = info.geometry(dtype="float32", page_bytes=self.pool_geometry.page_bytes)
        reader = WeightReader(model_dir, dtype=torch.float32, device=CPU)
        model = LlamaModel(model_config(info), reader, max_model_len=128, device=CPU)
        self.pool = torch.zeros(NUM_PAGES, self.pool_geometry.page_bytes, dtype=torch.uint8)
        limits = DecoderLimits(max_tokens=64, max_rows=BUCKET, max_context=128)
        self.decoder = CudaDecoder(model, library, self.pool, self.pool_geometry, limits, num_slots=NUM_SLOTS)
        self.tables = AdapterTables(self.geometry, max_adapters=4, tile_capacity=4096, device=CPU)
        self.lora = DecodeLora(
            library,
            self.tables,
            self.pool,
            self.geometry,
            rope=self.decoder.rope,
            silu_mul=self.decoder.silu_mul,
            max_rows=BUCKET,
            num_sms=2,
            max_rows_beside=max_rows_beside,
        )
        self.grouped = GroupedLora(library, self.tables, self.pool, self.geometry, max_tokens=64)
        self.base = BasePath(self.decoder.rope, self.decoder.silu_mul)
        self.added = AddedLoraPath(self.decoder.rope, self.decoder.silu_mul, self.grouped)
        library.track(
            self.pool,
            self.tables.tiles,
            self.tables.entries,
            *self.lora.fixed_tensors,
            *self.grouped.fixed_tensors,
        )
        self.writer = InputWriter(block_tokens=self.pool_geometry.block_tokens, pad_slot=NUM_SLOTS)
        self.variants: list[int] = []
        self.num_binds = 0

    def load_adapter(self, index: int, spec: AdapterSpec, pages: NDArray[np.int32], source: NDArray[np.uint8]) -> Done:
        self.pool[torch.from_numpy(pages.astype(np.int64))] = torch.from_numpy(source)
        self.tables.bind(index, spec, pages)
        self.num_binds += 1
        return Done()

    def unload_adapter(self, index: int) -> None:
        self.tables.unbind(index)

    def close(self) -> None:
        """Nothing to free."""

    def launch(self, plan: StepPlan) -> Done:
        is_decode, has_adapters = is_pure_decode(plan), bool((plan.adapters >= 0).any())
        path: LayerPath = self.base
        if is_decode:
            shape = StepShape(num_tokens=BUCKET, num_rows=BUCKET, width=9, num_samples=BUCKET)
            if has_adapters:
                variant = self.lora.prepare(plan.adapters, BUCKET, self.num_binds)
                path = self.lora.path(BUCKET, variant)
                self.variants.append(variant)
        else:
            shape = StepShape(
                num_tokens=len(plan.token_ids),
                num_rows=len(plan.slots),
                width=plan.block_tables.shape[1],
                num_samples=len(plan.sample_rows),
            )
            if has_adapters:
                self.grouped.prepare(plan)
                path = self.added
        layout = InputLayout(shape)
        buffer = np.full(layout.size, 1 << 20, dtype=np.int32)
        if is_decode:
            self.writer.write_decode(layout, buffer, plan)
        else:
            self.writer.write_mixed(layout, buffer, plan, np.zeros((0, 8), dtype=np.int32))
        # Separate tensors, as the host shim copies whole buffers.
        step = layout.views(torch.from_numpy(buffer))
        rest = self.decoder.forward(step, path, num_decode=plan.num_decode_rows)
        count = len(plan.sample_rows)
        drawn = self.decoder.logits(step, rest)[:count].argmax(-1).to(torch.int32)
        slots = plan.slots[plan.sample_rows]
        self.decoder.last_sampled[torch.from_numpy(slots.astype(np.int64))] = drawn
        return Done(StepResult(step_id=plan.step_id, slots=slots, token_ids=drawn.numpy()))


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


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
@pytest.mark.parametrize("max_rows_beside", [BUCKET, 0], ids=["beside", "in line"])
def test_prefill_mixed_and_padded_decode_steps_draw_what_the_torch_backend_draws(
    model_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, max_rows_beside: int
) -> None:
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if base.name.startswith("popen") else base) / "kernel-builds"
    shared.mkdir(exist_ok=True)
    own = HostRunner(model_dir, HostLibrary(torch.float32, shared, tmp_path), max_rows_beside)
    info = load_base_model(model_dir)
    oracle = TorchRunner(
        RunnerConfig(
            model_dir=model_dir,
            info=info,
            geometry=own.pool_geometry,
            num_pages=NUM_PAGES,
            max_num_seqs=NUM_SLOTS,
            max_model_len=128,
            num_threads=1,
        )
    )
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
