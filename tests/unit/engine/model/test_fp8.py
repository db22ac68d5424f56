"""FP8 weights: numbers and scales as the files have them or by definition, and products of activations quantised per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from loraplex_common.projections import Split
from loraplex_common.stored_forms.registry import quantisation_of
from loraplex_engine.model.fp8 import Fp8Linear, Fp8Weight, quantise, quantise_tokens, widen
from loraplex_engine.model.layers import TORCH_LINEARS, Dense, new_activation
from loraplex_engine.model.linear import Linear, StoredLinear
from loraplex_engine.model.weight_form import WeightForm, choose_weight_form, weights_numerics
from loraplex_engine.model.weights import WeightLayout, WeightReader
from safetensors.torch import load_file
from support.base_models import TinyBase, write_base_model
from support.quantised import awq, compressed_tensors, fp8, write_quantised

if TYPE_CHECKING:
    from pathlib import Path

    from support.quantised import Pack

CPU = torch.device("cpu")
BASE = TinyBase(hidden_size=256, intermediate_size=384, num_heads=4, num_kv_heads=2, head_dim=64)
"""Blocks of 128 fit the fused projections."""
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TENSOR = BLOCKS | {"activation_scheme": "static", "weight_block_size": None}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
ROUNDING = 2.0**-4
"""Half a step of e4m3, over the number: three bits behind the leading one."""


def channels(**activations: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, **activations}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


PER_TOKEN = {"input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}}
FORMS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "blocks": (fp8((128, 128), "weight_scale_inv"), BLOCKS),
    "tensor": (fp8(None, "weight_scale", activation="input_scale"), TENSOR),
    "channel": (
        compressed_tensors("float-quantized", torch.bfloat16, num_bits=8, type="float", strategy="channel"),
        channels(**PER_TOKEN),
    ),
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("fp8") / "base", BASE)


@pytest.fixture
def whole(tmp_path: Path, base_dir: Path) -> Path:
    """A copy whose weights `write_quantised` replaces by those that the quantised ones stand for."""
    return write_base_model(tmp_path / "whole", BASE)


def test_a_groups_largest_number_becomes_448_and_others_are_rounded_to_three_bits() -> None:
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 50)[:, None]

    codes, scales = quantise(x)

    assert (codes.float().abs().amax(-1) == 448).all()
    step = torch.maximum(x.abs() * ROUNDING, scales * 2.0**-10)  # subnormal numbers have a fixed step
    assert ((codes.float() * scales - x).abs() <= step * 1.0001).all()


def test_zeros_stay_zeros_and_what_is_no_number_stays_none() -> None:
    x = torch.ones(5, 128)
    x[0], x[1, 3], x[2, 5], x[3] = 0.0, float("nan"), float("inf"), 1e-38

    wide = widen(*quantise_tokens(x, is_blocked=False))

    assert (wide[0] == 0).all()
    assert wide[1].isnan().any()
    assert wide[2].isnan().any()
    assert wide[3].abs().max() <= 2.0**-100
    assert (wide[4] == 1).all()


def test_blocks_of_an_activation_have_scales_of_their_own() -> None:
    x = torch.cat((torch.full((2, 128), 1e-3), torch.full((2, 128), 1e3), torch.ones(2, 10)), dim=1)

    codes, scales = quantise_tokens(x, is_blocked=True)

    assert scales.shape == (2, 3)
    torch.testing.assert_close(widen(codes, scales), x, rtol=1e-6, atol=0)


def make_weight(outputs: int, inputs: int, *, is_blocked: bool, dtype: torch.dtype = torch.float32) -> Fp8Weight:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    if not is_blocked:
        return Fp8Weight(*quantise(weight), is_blocked=False, dtype=dtype)
    packed, _ = fp8((128, 128), "scale")(weight)
    return Fp8Weight(packed["weight"], packed["scale"], is_blocked=True, dtype=dtype)


@pytest.mark.parametrize("is_blocked", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_product_is_that_of_quantised_activations_and_the_weight(
    is_blocked: bool, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_engine.model.fp8.PRODUCT_ITEMS", 200 * 128)  # several pieces
    weight = make_weight(320, 200, is_blocked=is_blocked)
    bias, x = torch.randn(320), torch.randn(num_tokens, 200)
    linear = Fp8Linear(weight, bias)
    out = new_activation(num_tokens, 320, dtype=torch.float32, device=CPU)

    linear.into(x, out)

    wide = widen(*quantise_tokens(x, is_blocked=is_blocked)).double()
    expected = wide @ linear.rows(0, 320).double().t()
    torch.testing.assert_close(out.double(), expected + bias.double(), rtol=1e-5, atol=1e-4)
    linear.onto(x, out)
    torch.testing.assert_close(out.double(), 2 * (expected + bias.double()), rtol=1e-5, atol=1e-4)
    linear.multiply(x, out)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_product_is_that_of_torchs_scaled_products() -> None:
    weight, x = make_weight(96, 256, is_blocked=False), torch.randn(7, 256)
    linear, out, expected = Fp8Linear(weight), torch.empty(7, 96), torch.empty(7, 96)
    codes, scales = quantise_tokens(x, is_blocked=False)

    linear.into(x, out)

    torch._scaled_mm(
        codes, weight.codes.t(), scale_a=scales, scale_b=weight.scales.t(), out_dtype=torch.float32, out=expected
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


PREFIX = "model.layers.1."


def stored(path: str, inputs: int, outputs: int, split: Split) -> StoredLinear:
    return StoredLinear(name=PREFIX + path, in_features=inputs, out_features=outputs, split=split)


OPS = {
    "qkv": [
        stored(f"self_attn.{name}_proj", 256, outputs, Split.OUTPUTS)
        for name, outputs in (("q", 256), ("k", 128), ("v", 128))
    ],
    "o": [stored("self_attn.o_proj", 256, 256, Split.INPUTS)],
    "gate_up": [stored(f"mlp.{name}_proj", 256, 384, Split.OUTPUTS) for name in ("gate", "up")],
    "down": [stored("mlp.down_proj", 384, 256, Split.INPUTS)],
}


def read_ops(
    directory: Path, form: WeightForm = WeightForm.FP8, layout: WeightLayout | None = None
) -> dict[str, Linear]:
    reader = WeightReader(directory, dtype=torch.float32, device=CPU, layout=layout, form=form)
    return {op: reader.linear(parts, TORCH_LINEARS) for op, parts in OPS.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoints_numbers_and_scales_are_kept_as_they_are(tmp_path: Path, whole: Path, form: str) -> None:
    quantised = write_quantised(whole, tmp_path / "quantised", *FORMS[form])
    files, truth = load_file(quantised / "model.safetensors"), read_ops(whole, WeightForm.WHOLE)

    for op, linear in read_ops(quantised).items():
        assert isinstance(linear, Fp8Linear)
        numbers = torch.cat([files[part.weight].view(torch.uint8) for part in OPS[op]])
        assert torch.equal(linear.weight.codes.view(torch.uint8), numbers)
        assert linear.weight.is_blocked == (form == "blocks")
        assert torch.equal(linear.rows(0, 1 << 20), truth[op].rows(0, 1 << 20))
        assert linear.rows(3, 5).shape == (2, linear.in_features)
        assert linear.weight_bytes < truth[op].weight_bytes / 3


@pytest.mark.parametrize("form", FORMS)
def test_ranks_hold_parts_of_an_fp8_weight(tmp_path: Path, whole: Path, form: str) -> None:
    quantised = write_quantised(whole, tmp_path / "quantised", *FORMS[form])
    for rank in range(2):
        layout = WeightLayout(tp_degree=2, tp_rank=rank)
        truth = read_ops(whole, WeightForm.WHOLE, layout)
        for op, linear in read_ops(quantised, layout=layout).items():
            assert torch.equal(linear.rows(0, 1 << 20), truth[op].rows(0, 1 << 20)), op


@pytest.mark.parametrize("stored_as", ["whole", "awq"])
def test_any_checkpoint_is_quantised_on_load_with_a_scale_for_each_output(
    tmp_path: Path, whole: Path, stored_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_engine.model.weights.UNPACKED_ITEMS", 100 * 256)  # some rows at a time
    directory = whole
    if stored_as == "awq":
        directory = write_quantised(whole, tmp_path / "quantised", awq(32), AWQ)
    truth = read_ops(whole, WeightForm.WHOLE)
    reader = WeightReader(directory, dtype=torch.float32, device=CPU, form=WeightForm.FP8)
    squares = differences = 0.0

    for op, parts in OPS.items():
        linear = reader.linear(parts, TORCH_LINEARS)
        assert isinstance(linear, Fp8Linear)
        weight = truth[op].rows(0, 1 << 20)
        codes, scales = quantise(weight)
        assert torch.equal(linear.rows(0, 1 << 20), codes.float() * scales)
        squares += weight.double().square().sum().item()
        differences += (linear.rows(0, 1 << 20) - weight).double().square().sum().item()

    assert reader.added_error.relative is not None
    assert reader.added_error.relative == pytest.approx((differences / squares) ** 0.5, rel=1e-3)
    assert 0.01 < reader.added_error.relative < ROUNDING


def test_a_checkpoint_in_fp8_adds_no_error_and_keeps_what_it_keeps_whole(tmp_path: Path, whole: Path) -> None:
    pack, settings = FORMS["blocks"]
    settings = settings | {"modules_to_not_convert": ["o_proj"]}
    quantised = write_quantised(whole, tmp_path / "quantised", pack, settings, kept=("o_proj",))
    reader = WeightReader(quantised, dtype=torch.float32, device=CPU, form=WeightForm.FP8)

    linears = {op: reader.linear(parts, TORCH_LINEARS) for op, parts in OPS.items()}

    assert reader.added_error.relative is None
    assert isinstance(linears["o"], Dense)
    assert isinstance(linears["down"], Fp8Linear)


def test_layers_whose_blocks_do_not_fit_together_are_unpacked(tmp_path: Path) -> None:
    base = TinyBase(hidden_size=256, intermediate_size=384, num_heads=5, num_kv_heads=1, head_dim=32)
    whole = write_base_model(tmp_path / "whole", base)
    quantised = write_quantised(whole, tmp_path / "quantised", *FORMS["blocks"])
    parts = [
        stored(f"self_attn.{name}_proj", 256, outputs, Split.OUTPUTS)
        for name, outputs in (("q", 160), ("k", 32), ("v", 32))
    ]
    reader = WeightReader(quantised, dtype=torch.float32, device=CPU, form=WeightForm.FP8)

    linear = reader.linear(parts, TORCH_LINEARS)

    assert isinstance(linear, Dense)
    files = load_file(whole / "model.safetensors")
    assert torch.equal(linear.weight, torch.cat([files[part.weight] for part in parts]))


@pytest.mark.parametrize(
    ("asked", "checkpoint", "multiplies_fp8", "form", "numerics"),
    [
        ("auto", None, True, WeightForm.WHOLE, "whole"),
        ("auto", "blocks", True, WeightForm.FP8, "fp8-w8a8-dynamic"),
        ("auto", "tensor", True, WeightForm.FP8, "fp8-w8a8-dynamic"),
        ("auto", "channel", True, WeightForm.FP8, "fp8-w8a8-dynamic"),
        ("auto", "channel", False, WeightForm.WHOLE, "unpacked:compressed-tensors"),
        ("auto", "weights-only", True, WeightForm.WHOLE, "unpacked:compressed-tensors"),
        ("auto", "awq", True, WeightForm.WHOLE, "unpacked:awq"),
        ("none", "blocks", True, WeightForm.WHOLE, "unpacked:fp8"),
        ("fp8", None, False, WeightForm.FP8, "fp8-w8a8-dynamic"),
        ("fp8", "awq", True, WeightForm.FP8, "fp8-w8a8-dynamic"),
    ],
)
def test_a_checkpoint_in_fp8_stays_so_where_it_is_multiplied_and_meant_for_it(
    tmp_path: Path,
    whole: Path,
    asked: Any,
    checkpoint: str | None,
    multiplies_fp8: bool,
    form: WeightForm,
    numerics: str,
) -> None:
    directory, pack, settings = whole, *FORMS["channel"]
    if checkpoint == "weights-only":
        settings = channels(input_activations=None)
    elif checkpoint == "awq":
        pack, settings = awq(32), AWQ
    elif checkpoint is not None:
        pack, settings = FORMS[checkpoint]
    if checkpoint is not None:
        directory = write_quantised(whole, tmp_path / "quantised", pack, settings)
    quantisation = quantisation_of(directory)

    found = choose_weight_form(asked, quantisation, multiplies_fp8=multiplies_fp8)

    assert found is form
    assert weights_numerics(found, quantisation) == numerics
