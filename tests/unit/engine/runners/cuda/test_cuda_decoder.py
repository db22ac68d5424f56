"""The CUDA backend's decoder with its kernels run on the CPU: the same launches as on a GPU, against the torch backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary
from kernels.kernel_cases import relative_error
from loraplex_common.adapter_image import pack
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import load_base_model
from loraplex_engine.decode_runs import MIN_DECODE_RUNS
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.llama import LlamaModel
from loraplex_engine.model.weights import DTYPES, WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.cuda import decoder
from loraplex_engine.runners.cuda.decode_lora import DecodeLora
from loraplex_engine.runners.cuda.decoder import LargestStep, LlamaDecoder
from loraplex_engine.runners.cuda.linears import CUDA_LINEARS
from loraplex_engine.runners.cuda.lora_paths import AddedLoraPath, BasePath
from loraplex_engine.runners.cuda.step_input import InputLayout, InputWriter, StepShape, is_pure_decode
from loraplex_engine.runners.cuda.token_lora import make_token_lora
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.step import NO_ADAPTER, StepResult
from loraplex_kernels.attention.scalar import AttentionScalar
from loraplex_kernels.lora.tables import AdapterTables
from support.adapters import Recipe
from support.base_models import TinyBase, write_base_model
from support.engine_harness import recipe_adapter
from support.plans import Draw, Harness, Sequence_

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_engine.pool_geometry import PoolGeometry
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.runners.cuda.step_input import StepInputs
    from loraplex_engine.step import StepPlan
    from loraplex_kernels.attention.paged_kv import KvLayout
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

    @property
    def masks(self) -> NDArray[np.int32]:
        raise NotImplementedError

    def draw(self) -> None:
        raise NotImplementedError

    def add_done_callback(self, callback: object) -> None:
        callback()  # type: ignore[operator]


class HostRunner:
    """`CudaRunner` without streams and graphs: decode steps padded to a bucket, others as they are."""

    backend: ClassVar[str] = "cuda"
    pipeline_depth = 1

    def __init__(
        self,
        model_dir: Path,
        library: HostLibrary,
        *,
        max_rows_beside: int = BUCKET,
        min_decode_runs: int = MIN_DECODE_RUNS,
    ) -> None:
        info, dtype = load_base_model(model_dir), {value: name for name, value in DTYPES.items()}[library.dtype]
        self.pool_geometry = choose_pool_geometry(info, dtype=dtype)
        self.geometry = info.geometry(dtype=dtype, page_bytes=self.pool_geometry.page_bytes)
        reader = WeightReader(model_dir, dtype=library.dtype, device=CPU)
        model = LlamaModel(model_config(info.config), reader, CUDA_LINEARS, max_model_len=128, device=CPU)
        self.pool = torch.zeros(NUM_PAGES, self.pool_geometry.page_bytes, dtype=torch.uint8)
        limits = LargestStep(max_tokens=64, max_rows=NUM_SLOTS, max_context=128)
        self.decoder = LlamaDecoder(model, library, self.pool, self.pool_geometry, limits, num_slots=NUM_SLOTS)
        self.tables = AdapterTables(self.geometry, max_adapters=4, tile_capacity=4096, device=CPU)
        self.lora = DecodeLora(
            library,
            self.tables,
            self.pool,
            followers=self.decoder.followers,
            max_rows=BUCKET,
            num_sms=2,
            max_rows_beside=max_rows_beside,
        )
        self.token_lora = make_token_lora(
            library,
            self.tables,
            self.pool,
            self.geometry,
            max_rows=NUM_SLOTS,
            max_tokens=64,
            min_decode_runs=min_decode_runs,
        )
        self.base = BasePath(self.decoder.followers)
        self.added = AddedLoraPath(self.decoder.followers, self.token_lora)
        library.track(
            self.pool,
            self.tables.tiles,
            self.tables.entries,
            *self.lora.fixed_tensors,
            *self.token_lora.fixed_tensors,
        )
        self.writer = InputWriter(block_tokens=self.pool_geometry.block_tokens, pad_slot=NUM_SLOTS)
        self.variants: list[int] = []
        self.logits = torch.zeros(0)
        self.num_binds = 0

    def check_adapter(self, spec: AdapterSpec) -> None:
        pass

    def pin_host_memory(self, arena: NDArray[np.uint8]) -> None:
        pass

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
                self.token_lora.prepare(plan)
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
        self.logits = self.decoder.logits(step, rest)[:count]
        drawn = self.logits.argmax(-1).to(torch.int32)
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


class ScalarAttention:
    """Attention in bf16 by the kernel of fp32, as that of decode rows does not run on a CPU."""

    def __init__(self, library: HostLibrary, layout: KvLayout, limits: LargestStep) -> None:
        del limits
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
