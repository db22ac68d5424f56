"""Kernels of dense families that Llama does not need, on the CPU under sanitizers: forms of RoPE, of norms, of the MLP, caps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.rope_kv import RopeKv, RopeStyle
from loraplex_kernels.pointwise.branch_norm import BranchNorm
from loraplex_kernels.pointwise.embedding import Embedding
from loraplex_kernels.pointwise.rms_norm import RmsNorm
from loraplex_kernels.pointwise.silu_mul import GeluMul
from loraplex_kernels.pointwise.softcap import Softcap
from torch import Tensor

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
HEADS, KV_HEADS, BLOCK, EPS = 4, 2, 4, 1e-6


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@dataclass(frozen=True)
class RopeCase:
    """A model's heads, as far as rope_kv sees them."""

    head_dim: int
    style: RopeStyle
    dtype: torch.dtype = torch.float32
    has_norm: bool = False
    has_query_scale: bool = False
    has_delta: bool = False

    def norm(self, heads: Tensor, weight: Tensor) -> Tensor:
        rows = heads.flatten(1) if self.style.norms_whole else heads
        return reference.rms_norm(rows, weight, EPS, offset=float(self.style.unit_offset)).view_as(heads)


FORMS: Final = {
    "heads of 80, scaled queries": RopeCase(80, RopeStyle(), has_norm=True, has_query_scale=True),
    "part of heads of 96": RopeCase(96, RopeStyle(rotary_dim=64), torch.bfloat16, has_norm=True, has_delta=True),
    "heads of 256, unit offset": RopeCase(256, RopeStyle(unit_offset=True), torch.bfloat16, has_norm=True),
    "neighbours in part of heads": RopeCase(128, RopeStyle(rotary_dim=64, interleaved=True), torch.bfloat16),
    "no RoPE": RopeCase(64, RopeStyle(rotary_dim=0)),
    "norms over all heads": RopeCase(80, RopeStyle(norms_whole=True), torch.bfloat16, has_norm=True, has_delta=True),
}


@pytest.mark.parametrize("case", FORMS.values(), ids=FORMS.keys())
def test_a_form_of_rope_is_the_references(host_library: MakeHostLibrary, case: RopeCase) -> None:
    generator, head_dim, dtype = torch.Generator().manual_seed(3), case.head_dim, case.dtype
    page_bytes = 2 * 2 * KV_HEADS * BLOCK * head_dim * dtype.itemsize
    layout = KvLayout(
        page_bytes=page_bytes, block_tokens=BLOCK, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=head_dim
    )
    rotary_dim = head_dim if case.style.rotary_dim is None else case.style.rotary_dim
    rotary = reference.rotary_table(32, rotary_dim) if rotary_dim else None
    pool, query_scale = torch.zeros(5, page_bytes, dtype=torch.uint8), torch.linspace(1, 2, 32)
    qkv = torch.randn(3, layout.qkv_width, generator=generator).to(dtype)
    delta = torch.randn(3, layout.qkv_width, generator=generator) if case.has_delta else None
    before = (qkv if delta is None else (qkv + delta).to(dtype)).clone().view(3, -1, head_dim)
    positions, slots = torch.tensor([9, 0, 31]).int(), torch.tensor([4 * BLOCK + 1, -1, 2 * BLOCK + 3]).int()
    widths = (HEADS, KV_HEADS) if case.style.norms_whole else (1, 1)
    norms: list[Tensor | None] = [None, None]
    if case.has_norm:
        norms = [(torch.rand(n * head_dim, generator=generator) + 0.5).to(dtype) for n in widths]
    scale = query_scale if case.has_query_scale else None
    rope = RopeKv(host_library(dtype), layout, pool, rotary, norm_eps=EPS, style=case.style, query_scale=scale)

    rope.launch(1, qkv, positions, slots, q_norm=norms[0], k_norm=norms[1], delta=delta)

    q, key, value = torch.split(before, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    if norms[0] is not None and norms[1] is not None:
        q, key = case.norm(q, norms[0]), case.norm(key, norms[1])
    if rotary is not None:
        q, key = (reference.rope(each, rotary, positions, interleaved=case.style.interleaved) for each in (q, key))
    if case.has_query_scale:
        q = q * query_scale[positions.long()].to(dtype)[:, None, None]
    assert relative_error(qkv.view(3, -1, head_dim)[:, :HEADS], q) < TOLERANCE[dtype]
    for token, page, at in ((0, 4, 1), (2, 2, 3)):
        got_key, got_value = reference.read_kv(pool, layout, dtype, 1, torch.tensor([page]), BLOCK)
        assert relative_error(got_key[at], key[token]) < TOLERANCE[dtype]
        assert torch.equal(got_value[at], value[token])
    assert not pool[[0, 1, 3]].any()
    assert not pool[:, : page_bytes // 2].any(), "layer 0 was touched"


def test_a_rotary_dim_that_cuts_a_threads_dims_is_refused() -> None:
    with pytest.raises(ValueError, match="rotary_dim 24 is no multiple of 16"):
        RopeStyle(rotary_dim=24)


@dataclass(frozen=True)
class BranchCase:
    """A way of what attention or MLP has computed into the residual stream."""

    has_after: bool
    has_before: bool
    hidden: int = 576
    dtype: torch.dtype = torch.bfloat16
    unit_offset: bool = False
    multiplier: float = 1.0


BRANCHES: Final = {
    "Gemma": BranchCase(has_after=True, has_before=True, unit_offset=True),
    "OLMo": BranchCase(has_after=True, has_before=False, hidden=64, dtype=torch.float32),
    "Granite": BranchCase(has_after=False, has_before=True, multiplier=0.22),
}


@pytest.mark.parametrize("case", BRANCHES.values(), ids=BRANCHES.keys())
def test_a_branch_joins_the_residual_stream_and_the_next_norm_follows(
    host_library: MakeHostLibrary, case: BranchCase
) -> None:
    dtype, hidden, offset = case.dtype, case.hidden, float(case.unit_offset)
    generator = torch.Generator().manual_seed(hidden)
    x, residual = (torch.randn(5, hidden, generator=generator).to(dtype) for _ in range(2))
    after, before = (torch.randn(hidden, generator=generator).to(dtype) for _ in range(2))
    joins = BranchNorm(
        host_library(dtype),
        hidden,
        EPS,
        has_after=case.has_after,
        has_before=case.has_before,
        unit_offset=case.unit_offset,
        multiplier=case.multiplier,
    )
    branch = reference.rms_norm(x, after, EPS, offset=offset).to(dtype) if case.has_after else x
    expected = residual.clone()
    expected[[3, 0]] = (residual.float() + case.multiplier * branch.float()).to(dtype)[[3, 0]]
    rows, out = torch.tensor([3, -1, 0]).int(), poisoned(3, hidden, dtype=dtype)

    joins.launch(
        x,
        residual,
        out,
        after=after if case.has_after else None,
        before=before if case.has_before else None,
        rows=rows,
    )

    assert relative_error(residual, expected) < TOLERANCE[dtype]
    assert torch.equal(residual[[1, 2, 4]], expected[[1, 2, 4]])
    follows = reference.rms_norm(residual, before, EPS, offset=offset) if case.has_before else residual
    assert relative_error(out[[0, 2]], follows[[3, 0]]) < TOLERANCE[dtype]
    assert not out[1].any()


def test_a_branch_joins_the_residual_stream_where_nothing_follows(host_library: MakeHostLibrary) -> None:
    x, residual, after = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    expected = residual + reference.rms_norm(x, after, EPS)

    BranchNorm(host_library(torch.float32), 64, EPS, has_after=True, has_before=False).launch(
        x, residual, None, after=after
    )

    assert relative_error(residual, expected) < 1e-5


def test_a_norm_without_weight_and_a_weight_without_norm_are_refused(host_library: MakeHostLibrary) -> None:
    x, joins = torch.randn(1, 64), BranchNorm(host_library(torch.float32), 64, EPS, has_after=True, has_before=False)

    for weights in ({}, {"after": torch.ones(64), "before": torch.ones(64)}):
        with pytest.raises(ValueError, match="a norm needs its weight"):
            joins.launch(x, x.clone(), None, **weights)


def test_rms_norm_with_unit_offset_multiplies_by_one_plus_weight(host_library: MakeHostLibrary) -> None:
    x, weight, out = torch.randn(3, 576).bfloat16(), torch.randn(576).bfloat16(), poisoned(3, 576, dtype=torch.bfloat16)

    RmsNorm(host_library(torch.bfloat16), 576, EPS, unit_offset=True).launch(x, weight, out)

    assert torch.equal(out, reference.rms_norm(x, weight, EPS, offset=1.0).bfloat16()), "rounded more than once"


def test_gelu_mul(host_library: MakeHostLibrary) -> None:
    gate_up, out = (torch.randn(3, 2 * 136) * 3).bfloat16(), poisoned(3, 136, dtype=torch.bfloat16)

    GeluMul(host_library(torch.bfloat16), 136).launch(gate_up, out)

    assert relative_error(out, reference.gelu_mul(gate_up)) < TOLERANCE[torch.bfloat16]


def test_embedding_multiplies_its_own_rows_and_those_that_were_written_before(host_library: MakeHostLibrary) -> None:
    table, written = torch.randn(10, 64), torch.randn(64)
    out = poisoned(4, 64, dtype=torch.float32)
    out[2] = written
    ids, slots = torch.tensor([3, -1, -5, 10]).int(), torch.tensor([0, 2, 1, 0]).int()

    Embedding(host_library(torch.float32), 64, 2.5).launch(table, ids, slots, torch.tensor([7, 8, 6]).int(), out)

    assert torch.equal(out, 2.5 * torch.stack([table[3], table[6], written, torch.zeros(64)]))


@pytest.mark.parametrize("columns", [640, 393])
def test_a_softcap_keeps_what_is_no_token_and_what_is_beyond_its_columns(
    host_library: MakeHostLibrary, columns: int
) -> None:
    logits, vocab, width = (40 * torch.randn(3, columns)).bfloat16(), 384, 391
    logits[1, vocab:] = float("-inf")
    before, out = logits.clone(), poisoned(3, columns, dtype=torch.bfloat16)

    Softcap(host_library(torch.bfloat16), 30.0).launch(logits, out, width=width, vocab=vocab)

    expected = before.clone().div_(30.0).tanh_().mul_(30.0)
    assert relative_error(out[:, :vocab], expected[:, :vocab]) < TOLERANCE[torch.bfloat16]
    assert out[1, vocab:width].isneginf().all()
    assert relative_error(out[::2, vocab:width], expected[::2, vocab:width]) < TOLERANCE[torch.bfloat16]
    assert out[:, width:].isnan().all()
    assert torch.equal(logits, before)
