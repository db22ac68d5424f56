"""Dense layers and norms compute the same in either memory order of the activations."""

from __future__ import annotations

import pytest
import torch
from loraplex_engine.model.layers import Dense, RmsNorm, is_feature_major, new_activation

CPU = torch.device("cpu")


def activation(values: torch.Tensor) -> torch.Tensor:
    buffer = new_activation(*values.shape, dtype=values.dtype, device=CPU)
    buffer.copy_(values)
    return buffer


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 16, 256, 257])
@pytest.mark.parametrize("outputs", [64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_layers_equal_the_product_in_fp64(num_tokens: int, outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn((num_tokens, 48), generator=generator).to(dtype)
    weight = torch.randn((outputs, 48), generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    out = new_activation(num_tokens, outputs, dtype=dtype, device=CPU)

    Dense(weight, bias).into(activation(x), out)

    expected = x.double() @ weight.double().t() + bias.double()
    assert (out.double() - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.2)


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
