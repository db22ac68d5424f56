"""gate_up's FP8 products with the gate in them, on the host shim: the same logits as with a kernel of its own for the gate."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary, host_byte_map
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.runners.cuda import fp8_few_rows
from loraplex_engine.runners.cuda.decoder import LlamaDecoder
from loraplex_engine.runners.cuda.followers import Followers
from loraplex_engine.runners.cuda.fp8_linear import ScaledMmLinear
from loraplex_engine.runners.cuda.gate_products import GateProducts
from loraplex_engine.runners.cuda.lora_paths import AddedLoraPath, BasePath, InLineLoraPath
from loraplex_engine.runners.cuda.paged_attention import PagedAttention
from loraplex_engine.step import NO_ADAPTER
from loraplex_kernels.attention.scalar import AttentionScalar
from loraplex_kernels.pointwise.fp8 import SiluMulFp8
from loraplex_kernels.products import fp8_product
from support.base_models import TinyBase, write_base_model
from support.families import family_dir
from support.host_decoder import NUM_PAGES
from support.host_parts import PartRunner
from support.plans import Draw, Harness
from support.quantised import fp8, write_quantised

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_kernels.attention.paged_kv import KvLayout
    from torch import Tensor

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")

LLAMA = TinyBase(hidden_size=256, intermediate_size=256, num_heads=4, num_kv_heads=2, head_dim=64, num_layers=2)
"""Its inputs are several blocks, so that these have scales of their own."""
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def base_dir(name: str, scratch: Path) -> Path:
    if name == "Gemma 2":
        return family_dir("gemma2 on the host shim")
    whole = write_base_model(scratch / "whole", LLAMA)
    if name == "Llama":
        return whole
    return write_quantised(whole, scratch / "quantised", fp8((128, 128), "weight_scale_inv"), BLOCKS)


def scalar_attention(
    own: PagedAttention, library: HostLibrary, layout: KvLayout, *, scale: float | None, softcap: float | None, **_: int
) -> None:
    """Make attention without tensor cores in bf16, too; in the place of `PagedAttention.__init__`."""
    own._scalar = AttentionScalar(library, layout, scale=scale, softcap=softcap)


class GatedRunner(PartRunner):
    """A runner of FP8 products of few rows, bf16.

    Attributes:
        launched: Launches of gates by (within the product or apart, whether they write more than e4m3), of each step.
    """

    def __init__(self, model_dir: Path, library: HostLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(HostLibrary, "num_multiprocessors", 1)  # for which gate_up is wide
        monkeypatch.setattr(fp8_few_rows, "ARCH", library.arch)
        monkeypatch.setattr(fp8_product, "byte_map", host_byte_map)
        monkeypatch.setattr(PagedAttention, "__init__", scalar_attention)
        super().__init__(model_dir, library, weight_form=WeightForm.FP8)
        inputs = self.decoder._inputs
        assert inputs is not None
        library.track(*inputs.fixed_tensors)
        for layer in self.decoder._model.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                assert isinstance(linear, ScaledMmLinear)
                library.track(linear.weight.codes)
        self.launched: list[Counter[tuple[str, bool]]] = []

    def launch(self, plan: Any) -> Any:
        self.launched.append(Counter())
        return super().launch(plan)

    def count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count from now on."""
        apart, within = SiluMulFp8.launch, GateProducts.launch

        def count_apart(own: SiluMulFp8, gate_up: Tensor, out: Tensor | None, *args: Any, **more: Any) -> None:
            self.launched[-1]["apart", out is not None] += 1
            apart(own, gate_up, out, *args, **more)

        def count_within(own: GateProducts, layer: int, linear: Any, x: Tensor, gate_up: Tensor, out: Tensor) -> bool:
            done = within(own, layer, linear, x, gate_up, out)
            self.launched[-1]["within", not out.is_meta] += done
            return done

        monkeypatch.setattr(SiluMulFp8, "launch", count_apart)
        monkeypatch.setattr(GateProducts, "launch", count_within)


def steps_of(runner: GatedRunner) -> list[Tensor]:
    """Return the logits of prompts and of decode rows: no adapter's, as LoRA of prompts in bf16 takes tensor cores."""
    begin, draw = len(runner.steps), Draw(num_logprobs=1)
    harness = Harness(runner, runner.pool_geometry, NUM_PAGES)
    rows = [harness.add(tokens, adapter=NO_ADAPTER, draw=draw, forced=[7, 8]) for tokens in (range(5), range(40, 43))]
    for _ in range(3):
        harness.step(rows)
    return runner.steps[begin:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Llama in blocks", "Gemma 2"])
def test_logits_are_the_same_whether_the_gate_is_in_the_product_or_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runner = GatedRunner(base_dir(name, tmp_path), HostLibrary(torch.bfloat16, tmp_path), monkeypatch)
    with monkeypatch.context() as apart:
        apart.setattr(GateProducts, "launch", lambda *_: False)
        expected = steps_of(runner)
    runner.count(monkeypatch)

    found = steps_of(runner)

    for step, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(own, other), step
        assert own.isfinite().all(), step
    layers = runner.decoder._model.config.num_layers
    assert [dict(each) for each in runner.launched[len(expected) :]] == [{("within", False): layers}] * len(found)
    runner.magnitudes.close()


class Recorded:
    """Records what a path launches for gate_up, in the place of every kernel of it."""

    def __init__(self, *, has_products: bool) -> None:
        self.calls: list[str] = []
        self._has_products = has_products

    def launch(self, *args: object, **_: object) -> bool:
        """Stand in for `GateProducts.launch` and the gate's own."""
        is_gate = len(args) == GATE_ARGUMENTS
        self.calls.append("gate" if is_gate else "product with gate" if self._has_products else "none")
        return self._has_products

    def into(self, *_: object) -> None:
        """Stand in for a product."""
        self.calls.append("product")


GATE_ARGUMENTS = 2


def gate_up_of(followers: Followers, path: BasePath, linear: Any, step: Any) -> None:
    """Have a decoder without weights compute a layer's gate_up."""
    decoder = object.__new__(LlamaDecoder)
    decoder.followers = followers
    x = gate_up = act = torch.empty(0)
    decoder._gate_up(path, 0, linear, x, gate_up, act, step)


@pytest.mark.parametrize(
    ("ops", "has_products", "calls"),
    [
        (None, True, ["product with gate"]),
        (None, False, ["none", "product", "gate"]),
        ({"qkv", "down"}, True, ["product with gate"]),
    ],
    ids=["base", "too many rows", "LoRA elsewhere"],
)
def test_a_path_without_lora_on_gate_up_asks_for_both_at_once(
    ops: set[str] | None, has_products: bool, calls: list[str]
) -> None:
    recorded: Any = Recorded(has_products=has_products)
    followers = Followers(recorded, recorded, None, None, recorded)
    nothing: Any = None
    path = BasePath(followers)
    if ops is not None:
        path = InLineLoraPath(followers, nothing, nothing, nothing, ops=frozenset(ops))

    gate_up_of(followers, path, recorded, nothing)

    assert recorded.calls == calls


def test_a_path_with_lora_on_gate_up_never_asks_for_the_product_with_its_gate() -> None:
    recorded: Any = Recorded(has_products=True)
    followers = Followers(recorded, recorded, None, None, recorded)

    class Lora:
        """Adds nothing."""

        def apply(self, *_: object) -> None:
            recorded.calls.append("LoRA")

    step: Any = SimpleNamespace(scales=None)
    lora: Any = Lora()
    gate_up_of(followers, AddedLoraPath(followers, lora), recorded, step)

    assert recorded.calls == ["product", "LoRA", "gate"]
