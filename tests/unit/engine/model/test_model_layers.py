"""Linear layers and norms compute the same in either memory order of the activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from loraplex_engine.model.layers import TORCH_LINEARS, RmsNorm, is_feature_major, new_activation
from loraplex_engine.runners.cuda.linears import CUDA_LINEARS

if TYPE_CHECKING:
    from loraplex_engine.model.linear import MakeDense

CPU = torch.device("cpu")


def activation(values: torch.Tensor) -> torch.Tensor:
    buffer = new_activation(*values.shape, dtype=values.dtype, device=CPU)
    buffer.copy_(values)
    return buffer


@pytest.mark.parametrize("make", [TORCH_LINEARS.dense, CUDA_LINEARS.dense], ids=["torch", "cuda"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 16, 256, 257])
@pytest.mark.parametrize("outputs", [64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_layers_equal_the_product_in_fp64_and_add_it_to_what_is_there(
    make: MakeDense, num_tokens: int, outputs: int, dtype: torch.dtype, has_bias: bool
) -> None:
    if make is CUDA_LINEARS.dense and is_feature_major(num_tokens, dtype=dtype, device=CPU):
        pytest.skip("the CUDA backend's activations are token-major")
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn((num_tokens, 48), generator=generator).to(dtype)
    weight = torch.randn((outputs, 48), generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    before = torch.randn((num_tokens, outputs), generator=generator).to(dtype)
    out = new_activation(num_tokens, outputs, dtype=dtype, device=CPU)
    added = activation(before)
    linear = make(weight, bias if has_bias else None)

    linear.into(activation(x), out)
    linear.onto(activation(x), added)

    expected = x.double() @ weight.double().t() + (bias.double() if has_bias else 0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert (out.double() - expected).abs().max() < tolerance
    assert (added.double() - expected - before.double()).abs().max() < tolerance


@pytest.mark.parametrize("make", [TORCH_LINEARS.dense, CUDA_LINEARS.dense], ids=["torch", "cuda"])
def test_a_linear_layer_knows_its_widths_and_the_bytes_of_its_weight(make: MakeDense) -> None:
    linear = make(torch.zeros(70, 48, dtype=torch.bfloat16), torch.zeros(70, dtype=torch.bfloat16))

    assert (linear.in_features, linear.out_features, linear.weight_bytes) == (48, 70, 2 * 70 * 48)


def test_small_fp32_steps_are_feature_major() -> None:
    assert [is_feature_major(n, dtype=torch.float32, device=CPU) for n in (2, 3, 256, 257)] == [
        False,
        True,
        True,
        False,
    ]
    assert not is_feature_major(16, dtype=torch.bfloat16, device=CPU)


@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_of_the_norm_equal_its_formula(num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((num_tokens, 48), generator=generator).to(dtype)
    norm = RmsNorm(torch.randn(48, generator=generator).to(dtype), 1e-5)
    out = new_activation(num_tokens, 48, dtype=dtype, device=CPU)

    norm.into(activation(x), out)

    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (out.double() - expected).abs().max() < tolerance
    assert (norm(x).double() - expected).abs().max() < tolerance
