"""Attention of decode rows and the scalar kernel, run lane by lane on the CPU under sanitizers, for every size of a head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention.decode import AttentionDecode
from loraplex_kernels.attention.paged_kv import KvLayout, softcap_defines
from loraplex_kernels.attention.prefill import shared_bytes
from loraplex_kernels.attention.scalar import AttentionScalar

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
BLOCK, CONTEXTS = 4, (1, 0, 150)


@pytest.fixture(autouse=True)
def _the_same_numbers_each_time() -> None:
    torch.manual_seed(11)


def make_layout(head_dim: int, *, heads: int = 3, window: int = 0, dtype: torch.dtype = torch.bfloat16) -> KvLayout:
    return KvLayout(
        page_bytes=2 * BLOCK * head_dim * dtype.itemsize,
        block_tokens=BLOCK,
        num_heads=heads,
        num_kv_heads=1,
        head_dim=head_dim,
        window=window,
    )


def paged(layout: KvLayout, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool of random K and V in which the last page is NaN, and the pages of `CONTEXTS` in random order."""
    blocks = -(-max(CONTEXTS) // BLOCK)
    pool = torch.randn(blocks + 2, layout.page_bytes // dtype.itemsize).to(dtype)
    pool[-1] = float("nan")
    order = np.random.default_rng(5).permutation(blocks + 1).astype(np.int32)
    tables = torch.full((len(CONTEXTS), blocks), blocks + 1, dtype=torch.int32)
    tables[0, 0], tables[2] = int(order[0]), torch.from_numpy(order[1:])
    return pool.view(torch.uint8), tables


@pytest.mark.parametrize(
    ("head_dim", "window", "splits", "softcap"),
    [(64, 0, 1, None), (64, 40, 2, None), (80, 0, 2, None), (80, 40, 1, None), (256, 0, 2, 1.5)],
)
def test_decode_attention_reads_pages(
    host_library: MakeHostLibrary, head_dim: int, window: int, splits: int, softcap: float | None
) -> None:
    dtype, layout = torch.bfloat16, make_layout(head_dim, window=window)
    pool, tables = paged(layout, dtype)
    q = torch.randn(len(CONTEXTS), layout.qkv_width).to(dtype)
    rule: dict[str, float] = {} if softcap is None else {"scale": 0.3, "softcap": softcap}
    kernel = AttentionDecode(host_library(dtype), layout, max_rows=8, max_context=256, **rule)
    kernel._library.track(kernel._partial_out, kernel._partial_stats, kernel._arrivals)  # type: ignore[attr-defined]
    out = torch.full((len(CONTEXTS), 3 * head_dim), float("nan")).to(dtype)

    kernel.launch(0, pool, q, tables, torch.tensor(CONTEXTS, dtype=torch.int32), out, splits=splits)

    assert not out[1].any(), "a row of padding is zero"
    for row in (0, 2):
        key, value = reference.read_kv(pool, layout, dtype, 0, tables[row], CONTEXTS[row])
        query = q[row, : 3 * head_dim].view(1, 3, head_dim)
        expected = reference.attention(query, key, value, CONTEXTS[row] - 1, layout, **rule)
        assert relative_error(out[row].view_as(expected), expected) < 6e-3


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scalar_attention_takes_heads_of_no_whole_warp(host_library: MakeHostLibrary, softcap: float | None) -> None:
    dtype, layout = torch.float32, make_layout(80, dtype=torch.float32)
    pool, tables = paged(layout, dtype)
    q, out = torch.randn(2, 3 * 80), torch.full((2, 3 * 80), float("nan"))
    sequences, positions = torch.tensor([2, 2], dtype=torch.int32), torch.tensor([148, 149], dtype=torch.int32)
    rule: dict[str, float] = {} if softcap is None else {"scale": 0.3, "softcap": softcap}

    AttentionScalar(host_library(dtype), layout, **rule).launch(0, pool, q, tables, sequences, positions, out)

    key, value = reference.read_kv(pool, layout, dtype, 0, tables[2], 150)
    expected = reference.attention(q.view(2, 3, 80), key, value, 148, layout, **rule)
    assert relative_error(out.view_as(expected), expected) < 1e-5


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_softcap_that_bounds_nothing_is_refused(softcap: float) -> None:
    with pytest.raises(ValueError, match=r"softcap .* is not a number above 0"):
        softcap_defines(softcap)


def test_heads_of_256_take_smaller_tiles_where_shared_memory_is_small_and_are_refused_below_them() -> None:
    assert shared_bytes(256, 163 * 1024) == 128 * 1024
    assert shared_bytes(256, 99 * 1024) == 96 * 1024
    with pytest.raises(ValueError, match="98304 bytes of shared memory, this device has 65536"):
        shared_bytes(256, 64 * 1024)
