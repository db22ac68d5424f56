"""Inputs that are written in e4m3 alone where FP8 products are all that reads them: no other reader, and the same logits."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary
from loraplex_common.adapter_image import AdapterSpec, pack
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import load_base_model
from loraplex_engine.model.fp8 import Fp8Weight, quantise
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.runners.cuda import fp8_linear
from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs, QuantisingNorm
from loraplex_engine.runners.cuda.fp8_linear import ScaledMmLinear, read_codes_alone
from loraplex_engine.runners.cuda.graphs import ATTENTION
from loraplex_engine.runners.cuda.linears import CublasDense
from loraplex_engine.step import NO_ADAPTER
from loraplex_kernels.pointwise.fp8 import RmsNormFp8, SiluMulFp8
from loraplex_kernels.pointwise.rms_norm import RmsNorm
from support.base_models import TinyBase, write_base_model
from support.families import family_dir
from support.fp8_products import multiply_blocks
from support.host_decoder import NUM_PAGES
from support.host_parts import PartRunner
from support.part_adapters import FAMILIES, random_adapter
from support.plans import Draw, Harness, Sequence_
from support.quantised import fp8, write_quantised
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loraplex_engine.step import StepPlan
    from support.host_decoder import Done

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")

LLAMA = TinyBase(hidden_size=128, intermediate_size=256, num_heads=2, num_kv_heads=2, head_dim=64, num_layers=2)
QWEN2 = TinyBase(
    architecture="qwen2", hidden_size=128, intermediate_size=128, num_heads=2, num_kv_heads=1, head_dim=64, num_layers=2
)
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SHIM = "on the host shim"
BASES = ("Llama", "Llama in blocks", "Qwen2", *(f"{name} {SHIM}" for name in ("gemma2", "granite", "olmo3", "phi3")))
"""Biases, and every way of a branch into the residual stream."""


def base_dir(name: str, scratch: Path) -> Path:
    if name.endswith(SHIM):
        return family_dir(name)
    whole = write_base_model(scratch / "whole", QWEN2 if name == "Qwen2" else LLAMA)
    if name != "Llama in blocks":
        return whole
    return write_quantised(whole, scratch / "quantised", fp8((128, 128), "weight_scale_inv"), BLOCKS)


class PoisonedRunner(PartRunner):
    """Fills the buffers of inputs with NaN before each step, and counts what kernels write there.

    Attributes:
        written: Launches of fused kernels by (kernel, whether they write more than e4m3), of each step.
    """

    def __init__(self, model_dir: Path, library: HostLibrary) -> None:
        super().__init__(model_dir, library, weight_form=WeightForm.FP8)
        self.written: list[Counter[tuple[str, bool]]] = []

    def launch(self, plan: StepPlan) -> Done:
        self.decoder.work.x.fill_(torch.nan)
        self.decoder.work.act.fill_(torch.nan)
        self.written.append(Counter())
        return super().launch(plan)

    def count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count from now on."""
        for kernel, place in ((RmsNormFp8, 2), (SiluMulFp8, 1)):
            self._count(monkeypatch, kernel, place)

    def _count(self, monkeypatch: pytest.MonkeyPatch, kernel: type[Any], place: int) -> None:
        launch: Callable[..., None] = kernel.launch

        def counted(own: Any, *args: Any, **more: Any) -> None:
            self.written[-1][kernel.__name__, args[place] is not None] += 1
            launch(own, *args, **more)

        monkeypatch.setattr(kernel, "launch", counted)


def steps_of(runner: PoisonedRunner) -> list[Tensor]:
    """Return the logits of prompts and decode rows without adapters, then with one of attention, with any, and without."""
    geometry, begin = runner.geometry, len(runner.steps)
    harness = Harness(runner, runner.pool_geometry, NUM_PAGES)
    draw, forced = Draw(num_logprobs=1), list(range(7, 20))

    def add(tokens: range, adapter: int = NO_ADAPTER) -> Sequence_:
        return harness.add(tokens, adapter=adapter, draw=draw, forced=forced)

    def adapter(number: int, begins: str) -> int:
        paths = {each.name: each.path for each in geometry.layers[0]}
        drawn = random_adapter(geometry, FAMILIES["LoRA"], number)
        spec = AdapterSpec(
            drawn.spec.digest,
            tuple(each for each in drawn.spec.modules if paths[each.projection].startswith(begins)),
        )
        tensors = {key: arrays for key, arrays in drawn.tensors.items() if paths[key[1]].startswith(begins)}
        return harness.load(spec, pack(geometry, spec, tensors))

    plain = [add(range(5, 11)), add(range(3))]
    rows = [plain, plain]
    rows += [[*plain, add(range(40, 43), adapter(1, ATTENTION))]] * 2
    rows += [[*rows[-1], add(range(60, 62), adapter(2, ""))]] * 2
    for group in (*rows, plain):
        harness.step(group)
    for index in {each.adapter for each in rows[-1]} - {NO_ADAPTER}:
        runner.unload_adapter(index)
    return runner.steps[begin:]


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_logits_are_the_same_whether_or_not_inputs_have_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(fp8_linear, "_multiply_blocks", multiply_blocks)
    runner = PoisonedRunner(base_dir(name, tmp_path), HostLibrary(torch.float32, tmp_path))
    with monkeypatch.context() as everywhere:
        everywhere.setattr(runner.decoder, "_code_ops", frozenset())
        expected = steps_of(runner)
    runner.count(monkeypatch)

    found = steps_of(runner)

    for step, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(own, other), step
        assert own.isfinite().all(), step
    num_layers, written = runner.decoder._model.config.num_layers, runner.written[len(expected) :]
    alone, whole = (num_layers, 0), (0, num_layers)
    # Prompts and a decode step: without adapters, with one of attention, whose prompt takes no graph, with any; without.
    gates = [(each["SiluMulFp8", False], each["SiluMulFp8", True]) for each in written]
    assert gates == [alone, alone, whole, alone, whole, whole, alone]
    norms = [(each["RmsNormFp8", False], each["RmsNormFp8", True]) for each in written]
    if runner.decoder._code_ops == {"qkv", "gate_up", "down"}:
        alone, whole = (2 * num_layers, 0), (0, 2 * num_layers)
        assert norms == [alone, alone, whole, (num_layers, num_layers), whole, whole, alone]
    else:
        assert not any(count for count, _ in norms)
    runner.magnitudes.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["everything", "(IA)3", "DoRA", "lora_bias", "FLoRA"])
def test_parts_of_adapters_find_the_inputs_that_they_read(tmp_path: Path, family: str) -> None:
    runner = PoisonedRunner(write_base_model(tmp_path / "base", QWEN2), HostLibrary(torch.float32, tmp_path))
    ops, logits = runner.decoder._code_ops, list[list[Tensor]]()
    adapter = random_adapter(runner.geometry, FAMILIES[family], 3)
    for code_ops in (frozenset[str](), ops):
        runner.decoder._code_ops, runner.steps = code_ops, []
        harness = Harness(runner, runner.pool_geometry, NUM_PAGES)
        index = harness.load(adapter.spec, pack(runner.geometry, adapter.spec, adapter.tensors))
        rows = [
            harness.add(range(5), adapter=each, forced=[7, 8, 9], draw=Draw(num_logprobs=1))
            for each in (index, NO_ADAPTER)
        ]
        for group in (rows[1:], rows, rows, rows[1:]):
            harness.step(group)
        runner.unload_adapter(index)
        logits.append(runner.steps)

    assert ops == {"qkv", "gate_up", "down"}
    for found, expected in zip(*logits, strict=True):
        assert torch.equal(found, expected)
        assert found.isfinite().all()
    runner.magnitudes.close()


class Case:
    """An input that is written in e4m3 alone, and a linear layer of it."""

    def __init__(self, scratch: Path) -> None:
        config = model_config(load_base_model(write_base_model(scratch / "base", LLAMA)).config)
        self.library = HostLibrary(torch.float32, scratch)
        self.inputs = Fp8Inputs(self.library, config, max_tokens=8)
        self.linear = self.linear_of(is_blocked=False)
        self.norm = QuantisingNorm(self.library, 128, 1e-5, self.inputs)
        self.x, self.out = torch.randn(8, 128), torch.zeros(8, 64)

    def linear_of(self, *, is_blocked: bool) -> ScaledMmLinear:
        codes, scales = quantise(torch.randn(64, 128))
        scales = scales[:1].view(1, 1) if is_blocked else scales
        return ScaledMmLinear(self.inputs, Fp8Weight(codes, scales, is_blocked=is_blocked, dtype=torch.float32))

    def written(self) -> Tensor:
        """Norm ``x`` and return what stands for it."""
        placeholder = self.inputs.without_memory(self.x)
        self.norm.launch(self.x, torch.ones(128), placeholder)
        return placeholder


@pytest.fixture
def case(tmp_path: Path) -> Case:
    torch.manual_seed(0)
    return Case(tmp_path)


def test_a_product_reads_an_input_without_memory_once(case: Case) -> None:
    expected, plain = torch.zeros(8, 64), torch.zeros(8, 128)
    case.norm.launch(case.x, torch.ones(128), plain)
    case.linear.into(plain, expected)
    normed = case.written()

    case.linear.into(normed, case.out)

    assert torch.equal(case.out, expected)
    with pytest.raises(RuntimeError, match=r"\[8, 128\] that was written in e4m3 alone is not there"):
        case.linear.into(normed, case.out)


def test_an_input_without_memory_is_not_mistaken_for_another(case: Case) -> None:
    first, second = case.written(), case.written()

    with pytest.raises(RuntimeError, match="is not there to be quantised"):
        case.linear.into(first, case.out)
    with pytest.raises(RuntimeError, match="is not there to be quantised"):
        case.linear.into(second, case.out)  # a failed product does not leave its input to the next


def test_a_product_of_other_scales_does_not_read_an_input_without_memory(case: Case) -> None:
    normed = case.written()

    with pytest.raises(RuntimeError, match="is not there to be quantised"):
        case.linear_of(is_blocked=True).into(normed, case.out)


def test_no_kernel_and_no_other_product_reads_an_input_without_memory(case: Case) -> None:
    normed, weight = case.written(), torch.ones(128)

    with pytest.raises(ValueError, match="x: expected"):
        RmsNorm(case.library, 128, 1e-5).launch(normed, weight, torch.zeros(8, 128))
    with pytest.raises(ValueError, match="out: expected"):
        RmsNorm(case.library, 128, 1e-5).launch(case.x, weight, normed)
    with pytest.raises(RuntimeError):
        CublasDense(torch.ones(64, 128)).into(normed, case.out)
    with pytest.raises(RuntimeError):
        CublasDense(torch.ones(64, 128)).onto(normed, case.out)


def test_layers_of_other_scales_or_none_read_more_than_codes(case: Case) -> None:
    rows, whole = case.linear, CublasDense(torch.ones(64, 128))

    assert read_codes_alone([rows, rows], case.inputs)
    assert not read_codes_alone([rows, whole], case.inputs)
    blocked = case.linear_of(is_blocked=True)  # fused kernels write scales of groups from now on
    assert not read_codes_alone([rows, blocked], case.inputs)
    assert read_codes_alone([blocked], case.inputs)
