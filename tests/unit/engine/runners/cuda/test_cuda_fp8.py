"""Steps of the CUDA backend over FP8 weights, its kernels and torch's scaled products on the CPU, against the torch backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary, host_byte_map
from kernels.kernel_cases import relative_error
from loraplex_common.adapter_image import pack
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.fp8 import Fp8Linear, Fp8Weight, quantise, quantise_tokens
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.runners.cuda import fp8_few_rows, fp8_linear
from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs, padded_rows
from loraplex_engine.runners.cuda.fp8_linear import ScaledMmLinear
from loraplex_engine.runners.cuda.lora_paths import BesideLoraPath
from loraplex_engine.runners.cuda.part_variants import NO_GRAPH
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.step import NO_ADAPTER
from loraplex_kernels.products import fp8_product
from support.adapters import Recipe
from support.base_models import TinyBase, write_base_model
from support.engine_harness import recipe_adapter
from support.fp8_products import multiply_blocks
from support.host_decoder import BUCKET, CPU, NUM_PAGES, NUM_SLOTS, HostRunner
from support.host_parts import PartRunner
from support.part_adapters import FAMILIES, random_adapter
from support.plans import Draw, Harness, Sequence_
from support.quantised import fp8, write_quantised

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.step import StepResult
    from torch import Tensor

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")

BASE = TinyBase(hidden_size=128, intermediate_size=256, num_heads=2, num_kv_heads=2, head_dim=64, num_layers=1)
RECIPES = (Recipe(rank=4, seed=1), Recipe(rank=9, targets=("q_proj", "v_proj"), seed=2))
PART_BASE = TinyBase(
    architecture="qwen2", hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1, head_dim=64, num_layers=1
)
TOLERANCE = 2e-2
"""Now and then a number falls on the other side of a tie; without LoRA the difference is 0.2."""
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("fp8") / "base", BASE)


def make_oracle(model_dir: Path, like: HostRunner) -> TorchRunner:
    limits = EngineLimits(pool=like.pool_geometry, num_pages=NUM_PAGES, max_num_seqs=NUM_SLOTS, max_model_len=128)
    reader = WeightReader(model_dir, dtype=torch.float32, device=CPU, form=WeightForm.FP8)
    return TorchRunner(RunnerConfig(info=load_base_model(model_dir), limits=limits), reader)


def centred_logits(runner: HostRunner | TorchRunner, result: StepResult) -> Tensor:
    """What logits and log probabilities have in common."""
    if isinstance(runner, HostRunner):
        logits = runner.logits.float()
    else:
        logits = torch.empty(len(result.slots), len(next(iter(result.logprobs.values())).logprobs) - 1)
        for row, entry in result.logprobs.items():
            logits[row, entry.token_ids[1:]] = torch.from_numpy(entry.logprobs[1:])
    return logits - logits.mean(-1, keepdim=True)


def steps_of(runner: HostRunner | TorchRunner, model_dir: Path, like: HostRunner) -> list[Tensor]:
    """Return the logits of steps with prompts, with both, and with decode rows."""
    harness = Harness(runner, like.pool_geometry, NUM_PAGES)
    info, indices = load_base_model(model_dir), []
    for number, recipe in enumerate(RECIPES):
        spec, tensors = recipe_adapter(info, recipe, f"{number:064x}")
        indices.append(harness.load(spec, pack(runner.geometry, spec, tensors)))
    draw, forced = Draw(num_logprobs=BASE.vocab_size), list(range(7, 20))

    def add(tokens: range, adapter: int = NO_ADAPTER, chunks: list[int] | None = None, scale: float = 1.0) -> Sequence_:
        return harness.add(tokens, adapter=adapter, scale=scale, chunks=chunks or [], draw=draw, forced=forced)

    rows = [add(range(5, 11), indices[0]), add(range(40, 43), indices[1], [2], 0.5), add(range(2))]
    late = add(range(60, 62))
    plans = [rows, [*rows, late], [*rows, late], [rows[1], late]]
    return [centred_logits(runner, harness.step(plan)) for plan in plans]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_rows_beside", "is_blocked"), [(BUCKET, False), (0, True)], ids=["beside", "blocks in order"]
)
def test_prompts_and_decode_rows_have_the_torch_backends_logits(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_rows_beside: int, is_blocked: bool
) -> None:
    if is_blocked:
        monkeypatch.setattr(fp8_linear, "_multiply_blocks", multiply_blocks)
        whole = write_base_model(tmp_path / "whole", BASE)
        model_dir = write_quantised(whole, tmp_path / "quantised", fp8((128, 128), "weight_scale_inv"), BLOCKS)
    library = HostLibrary(torch.float32, tmp_path)
    own = HostRunner(model_dir, library, max_rows_beside=max_rows_beside, weight_form=WeightForm.FP8)
    oracle = make_oracle(model_dir, own)

    found, expected = (steps_of(runner, model_dir, own) for runner in (own, oracle))

    for step, (mine, truth) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(mine, truth) < TOLERANCE, step
    assert own.variants == [2, 1]
    assert isinstance(own.lora.path(BUCKET, 1), BesideLoraPath)
    oracle.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("families", "variant"), [(["everything", "(IA)3", "DoRA", "LoRA"], 6), (["FLoRA", "(IA)3", "DoRA"], NO_GRAPH)]
)
def test_adapters_of_any_parts_have_the_torch_backends_logits(
    tmp_path: Path, families: list[str], variant: int
) -> None:
    """(IA)3 scales inputs before they are quantised, and norms of DoRA and products of FLoRA are those of the unpacked weight."""
    base_dir = write_base_model(tmp_path / "base", PART_BASE)
    own = PartRunner(base_dir, HostLibrary(torch.float32, tmp_path), weight_form=WeightForm.FP8)
    oracle = make_oracle(base_dir, own)
    logits: list[list[Tensor]] = []

    for runner in (own, oracle):
        harness, rows = Harness(runner, own.pool_geometry, NUM_PAGES), []
        for number, family in enumerate(families):
            adapter = random_adapter(runner.geometry, FAMILIES[family], number)
            index = harness.load(adapter.spec, pack(runner.geometry, adapter.spec, adapter.tensors))
            tokens = range(10 * number, 10 * number + 5)
            rows.append(
                harness.add(tokens, adapter=index, forced=[7, 8, 9], draw=Draw(num_logprobs=PART_BASE.vocab_size))
            )
        logits.append([centred_logits(runner, harness.step(rows)) for _ in range(2)])

    for step, (mine, truth) in enumerate(zip(*logits, strict=True)):
        assert relative_error(mine, truth) < TOLERANCE, step
    assert set(own.variants) == {variant}
    own.magnitudes.close()
    oracle.close()


class Case:
    """A linear layer in FP8 with its inputs, and the reference of its products."""

    def __init__(self, scratch: Path, *, max_tokens: int = 24) -> None:
        config = model_config(load_base_model(write_base_model(scratch / "base", PART_BASE)).config)
        self.library = HostLibrary(torch.float32, scratch)
        self.inputs = Fp8Inputs(self.library, config, max_tokens=max_tokens)
        weight = Fp8Weight(*quantise(torch.randn(64, 128)), is_blocked=False, dtype=torch.float32)
        self.linear, self.reference = ScaledMmLinear(self.inputs, weight), Fp8Linear(weight)

    def buffer(self, tokens: int, width: int) -> Tensor:
        """Return a view of a buffer with room for what products write beyond."""
        return torch.zeros(padded_rows(tokens), width)[:tokens]

    def expected(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), 64)
        self.reference.into(x, out)
        return out


@pytest.fixture
def case(tmp_path: Path) -> Case:
    torch.manual_seed(0)
    return Case(tmp_path)


def test_products_of_any_number_of_tokens_write_their_own_rows(case: Case) -> None:
    for tokens in (1, 8, 9):
        x, out = torch.randn(tokens, 128), case.buffer(tokens, 64)

        case.linear.into(x, out)

        assert relative_error(out, case.expected(x)) < 1e-5


def test_a_product_is_added_some_rows_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.inputs, "_sum_rows", 8)
    x, out = torch.randn(20, 128), torch.ones(20, 64)

    case.linear.onto(x, out)

    assert relative_error(out - 1, case.expected(x)) < 1e-5


def test_a_written_input_is_read_once_and_not_after_it_was_changed(case: Case) -> None:
    x, other = torch.randn(3, 128), torch.randn(3, 128)
    out, codes = case.buffer(3, 64), quantise_tokens(other, is_blocked=False)

    def write() -> None:
        """Write another input's codes in the place of those of ``x``, so that the product tells what it read."""
        rows = case.inputs.to_write(x)
        rows.codes[:3], rows.scales[:, :3] = codes[0], codes[1].t()

    write()
    case.linear.into(x, out)
    assert relative_error(out, case.expected(other)) < 1e-5
    case.linear.into(x, out)
    assert relative_error(out, case.expected(x)) < 1e-5, "read twice"
    write()
    case.inputs.forget(x)
    case.linear.into(x, out)
    assert relative_error(out, case.expected(x)) < 1e-5, "read after it was changed"
    write()
    case.linear.into(other, out)
    assert relative_error(out, case.expected(other)) < 1e-5, "read for another input"
    case.linear.into(x, out)
    assert relative_error(out, case.expected(x)) < 1e-5, "read after another input took its place"


def test_few_rows_take_our_product_and_more_take_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_few_rows, "ARCH", "host")
    monkeypatch.setattr(fp8_product, "byte_map", host_byte_map)
    config = model_config(load_base_model(write_base_model(tmp_path / "base", PART_BASE)).config)
    library = HostLibrary(torch.bfloat16, tmp_path)
    weight = Fp8Weight(*quantise(torch.randn(64, 128)), is_blocked=False, dtype=torch.bfloat16)
    inputs, bias = Fp8Inputs(library, config, max_tokens=160), torch.randn(64).bfloat16()
    library.track(weight.codes, inputs.fixed_tensors[0])
    linear, reference = ScaledMmLinear(inputs, weight, bias), Fp8Linear(weight, bias)
    by_torch: list[int] = []
    monkeypatch.setattr(fp8_linear, "_multiply_rows", lambda rows, *_: by_torch.append(len(rows.codes)))
    x, out, expected = torch.randn(3, 128).bfloat16(), torch.ones(3, 64).bfloat16(), torch.ones(3, 64).bfloat16()

    linear.onto(x, out)
    reference.onto(x, expected)
    assert relative_error(out, expected) < 1e-2, "added"
    linear.into(x, out)
    reference.into(x, expected)
    assert relative_error(out, expected) < 1e-2, "written"
    assert not by_torch
    linear.into(torch.randn(129, 128).bfloat16(), torch.empty(padded_rows(129), 64).bfloat16()[:129])
    assert by_torch == [padded_rows(129)]
