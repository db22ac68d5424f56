"""Keys and values as e4m3: the bits that the kernels' reference makes, the size of their pages, and what is handed on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loraplex_engine.pool_geometry import PoolGeometry
from loraplex_engine.runners.torch.attention import PagedPool
from loraplex_engine.runners.torch.kv_store import quantise
from loraplex_kernels import reference


def geometry(head_dim: int = 64, block_tokens: int = 16, kv_dtype: str = "fp8", kv_heads: int = 3) -> PoolGeometry:
    return PoolGeometry(
        dtype="bfloat16",
        num_layers=5,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        kv_dtype=kv_dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_quantised_to_the_bits_of_the_kernels_reference(dtype: torch.dtype) -> None:
    rows = (torch.randn(512, 64) * 10 ** (12 * torch.rand(512, 1) - 7)).to(dtype)
    rows[:, ::7] *= 1e-4  # below e4m3's normal numbers
    rows[0], rows[1, 3], rows[2, 4], rows[3, 5] = 0, float("nan"), float("-inf"), 1e30
    rows[4] = 448 * 1.0625 * torch.arange(64) / 63  # ties, and a scale that bf16 rounds

    values, scales = quantise(rows)

    expected, expected_scales = reference.quantise_kv(rows)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales.view(torch.int16), expected_scales.view(torch.int16))


def test_an_element_is_off_by_a_sixteenth_or_by_a_part_of_its_rows_largest() -> None:
    rows = torch.randn(2000, 128) * 10 ** (4 * torch.rand(2000, 1) - 2)

    values, scales = quantise(rows)

    kept = values.float() * scales.float()[:, None]
    bound = torch.maximum(rows.abs() / 16, rows.abs().amax(-1, keepdim=True) * 2.0**-18)
    assert ((kept - rows).abs() <= bound * (1 + 1e-6)).all()
    assert ((kept - rows).norm(dim=-1) / rows.norm(dim=-1)).mean() < 0.027


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_value_makes_its_whole_row_not_a_number(broken: float) -> None:
    rows = torch.randn(2, 64)
    rows[0, 5] = broken

    values, scales = quantise(rows)

    kept = values.float() * scales.float()[:, None]
    assert kept[0].isnan().all()
    assert kept[1].isfinite().all()


def test_values_beyond_the_largest_scale_are_clipped_and_a_row_of_zeros_stays_one() -> None:
    values, scales = quantise(torch.tensor([[1e6, 1.0], [0.0, 0.0]]))

    assert (values.float() * scales.float()[:, None]).tolist() == [[57120.0, 0.99609375], [0.0, 0.0]]


@pytest.mark.parametrize(("head_dim", "block_tokens"), [(64, 16), (80, 16), (128, 1), (256, 2)])
def test_a_page_holds_a_byte_a_value_and_two_a_scale_in_whole_tiles(head_dim: int, block_tokens: int) -> None:
    found = geometry(head_dim, block_tokens)
    rows = 5 * 2 * 3 * block_tokens

    assert found.values_bytes == rows * head_dim
    assert found.scales_bytes == rows * 2
    assert found.token_bytes == 5 * 2 * 3 * (head_dim + 2)
    assert found.page_bytes % 128 == 0
    assert 0 <= found.page_bytes - found.values_bytes - found.scales_bytes < 128
    assert geometry(head_dim, block_tokens, "").page_bytes == 2 * rows * head_dim


def test_an_unknown_type_of_keys_and_values_is_refused() -> None:
    with pytest.raises(ValueError, match="keys and values of 'int4'"):
        geometry(kv_dtype="int4")


def test_pages_are_laid_out_as_the_kernels_reference_reads_them() -> None:
    """The layout is written down twice, for the torch backend and for the kernels: both must mean the same bytes."""
    from loraplex_kernels.attention.paged_kv import KvLayout

    shape = geometry(head_dim=80, block_tokens=4)
    pool = PagedPool(torch.zeros(6, shape.page_bytes, dtype=torch.uint8), shape, 3, torch.float32, scale=1.0)
    pages, positions = np.array([4, 1, 5]), np.arange(10)
    kv = torch.randn(10, 6, 80)
    pool.write(3, pool.token_index(pages[positions // 4], positions % 4), kv)
    layout = KvLayout(
        page_bytes=shape.page_bytes,
        block_tokens=4,
        num_heads=3,
        num_kv_heads=3,
        head_dim=80,
        scales_offset=shape.values_bytes,
    )

    key, value = reference.read_kv(pool.pages, layout, torch.float32, 3, torch.from_numpy(pages), 10)

    assert torch.equal(torch.cat((key, value), dim=1), kv), "what is kept is what a step's own tokens see"
