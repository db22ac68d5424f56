"""Inputs, launches and expected results of the kernels that dense families besides Llama need, for the host and for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from loraplex_kernels import reference
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.rope_kv import RopeKv, RopeStyle
from loraplex_kernels.pointwise.branch_norm import BranchNorm
from loraplex_kernels.pointwise.silu_mul import GeluMul
from loraplex_kernels.pointwise.softcap import Softcap
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary

HEADS, KV_HEADS, BLOCK, EPS = 4, 2, 4, 1e-6
Compared = Iterator[tuple[str, Tensor, Tensor]]
"""What is compared, what a kernel made, what it should have made; on the host."""


@dataclass(frozen=True)
class RopeCase:
    """A model's heads, as far as rope_kv sees them."""

    head_dim: int
    style: RopeStyle
    has_norm: bool = False
    has_query_scale: bool = False
    has_delta: bool = False

    def norm(self, heads: Tensor, weight: Tensor) -> Tensor:
        rows = heads.flatten(1) if self.style.norms_whole else heads
        return reference.rms_norm(rows, weight, EPS, offset=float(self.style.unit_offset)).view_as(heads)


FORMS: Final = {
    "heads of 80, scaled queries": RopeCase(80, RopeStyle(), has_norm=True, has_query_scale=True),
    "part of heads of 96": RopeCase(96, RopeStyle(rotary_dim=64), has_norm=True, has_delta=True),
    "heads of 256, unit offset": RopeCase(256, RopeStyle(unit_offset=True), has_norm=True),
    "neighbours in part of heads": RopeCase(128, RopeStyle(rotary_dim=64, interleaved=True)),
    "no RoPE": RopeCase(64, RopeStyle(rotary_dim=0)),
    "norms over all heads": RopeCase(80, RopeStyle(norms_whole=True), has_norm=True, has_delta=True),
}


@dataclass(frozen=True)
class BranchCase:
    """A way of what attention or MLP has computed into the residual stream."""

    has_after: bool
    has_before: bool
    hidden: int = 576
    unit_offset: bool = False
    multiplier: float = 1.0


BRANCHES: Final = {
    "Gemma": BranchCase(has_after=True, has_before=True, unit_offset=True),
    "OLMo": BranchCase(has_after=True, has_before=False, hidden=64),
    "Granite": BranchCase(has_after=False, has_before=True, multiplier=0.22),
}


class DenseCases:
    """Runs cases with one library."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library, self._dtype, self._device = library, library.dtype, library.device
        self._generator = torch.Generator().manual_seed(3)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self._dtype)

    def _on_device(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone().to(self._device)

    def rope(self, case: RopeCase) -> Compared:
        """One token beside a page, two into pages of layer 1."""
        head_dim, dtype = case.head_dim, self._dtype
        page_bytes = 2 * 2 * KV_HEADS * BLOCK * head_dim * dtype.itemsize
        layout = KvLayout(
            page_bytes=page_bytes, block_tokens=BLOCK, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=head_dim
        )
        rotary_dim = head_dim if case.style.rotary_dim is None else case.style.rotary_dim
        rotary = reference.rotary_table(32, rotary_dim) if rotary_dim else None
        query_scale = torch.linspace(1, 2, 32) if case.has_query_scale else None
        pool = torch.zeros(5, page_bytes, dtype=torch.uint8, device=self._device)
        qkv, delta = self._randn(3, layout.qkv_width), None
        if case.has_delta:
            delta = torch.randn(3, layout.qkv_width, generator=self._generator)
        before = (qkv if delta is None else (qkv + delta).to(dtype)).clone().view(3, -1, head_dim)
        positions, slots = torch.tensor([9, 0, 31]).int(), torch.tensor([4 * BLOCK + 1, -1, 2 * BLOCK + 3]).int()
        widths = (HEADS, KV_HEADS) if case.style.norms_whole else (1, 1)
        norms = [self._randn(n * head_dim) if case.has_norm else None for n in widths]
        rope = RopeKv(
            self._library,
            layout,
            pool,
            self._on_device(rotary),
            norm_eps=EPS,
            style=case.style,
            query_scale=self._on_device(query_scale),
        )
        found = qkv.clone().to(self._device)

        rope.launch(
            1,
            found,
            positions.to(self._device),
            slots.to(self._device),
            q_norm=self._on_device(norms[0]),
            k_norm=self._on_device(norms[1]),
            delta=self._on_device(delta),
        )

        q, key, value = torch.split(before, [HEADS, KV_HEADS, KV_HEADS], dim=1)
        if norms[0] is not None and norms[1] is not None:
            q, key = case.norm(q, norms[0]), case.norm(key, norms[1])
        if rotary is not None:
            q, key = (reference.rope(each, rotary, positions, interleaved=case.style.interleaved) for each in (q, key))
        if query_scale is not None:
            q = q * query_scale[positions.long()].to(dtype)[:, None, None]
        yield "q", found.cpu().view(3, -1, head_dim)[:, :HEADS], q
        on_host = pool.cpu()
        for token, page, at in ((0, 4, 1), (2, 2, 3)):
            got_key, got_value = reference.read_kv(on_host, layout, dtype, 1, torch.tensor([page]), BLOCK)
            yield f"key of token {token}", got_key[at], key[token]
            yield f"value of token {token}", got_value[at], value[token]
            on_host[page] = 0
        assert not on_host[[0, 1, 3]].any(), "a page without a token was written"
        assert not pool[:, : page_bytes // 2].any(), "layer 0 was written"

    def branch(self, case: BranchCase) -> Compared:
        """Two rows of five, and one of padding."""
        dtype, hidden, offset = self._dtype, case.hidden, float(case.unit_offset)
        x, residual, after, before = (self._randn(*shape) for shape in ((5, hidden), (5, hidden), (hidden,), (hidden,)))
        joins = BranchNorm(
            self._library,
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
        out = torch.full((3, hidden), float("nan"), dtype=dtype).to(self._device)
        found = residual.clone().to(self._device)

        joins.launch(
            x.to(self._device),
            found,
            out,
            after=self._on_device(after) if case.has_after else None,
            before=self._on_device(before) if case.has_before else None,
            rows=torch.tensor([3, -1, 0]).int().to(self._device),
        )

        joined = found.cpu()
        yield "residual", joined, expected
        follows = reference.rms_norm(joined, before, EPS, offset=offset) if case.has_before else joined
        yield "what follows", out.cpu()[[0, 2]], follows[[3, 0]]
        assert torch.equal(joined[[1, 2, 4]], residual[[1, 2, 4]]), "another row was touched"
        assert not out[1].any(), "padding is not zero"

    def gelu_mul(self) -> Compared:
        """A width that no block covers."""
        gate_up = 3 * self._randn(3, 2 * 136)
        out = torch.full((3, 136), float("nan"), dtype=self._dtype).to(self._device)

        GeluMul(self._library, 136).launch(gate_up.to(self._device), out)

        yield "gelu", out.cpu(), reference.gelu_mul(gate_up)

    def softcap(self, columns: int) -> Compared:
        """Rows with and without added tokens."""
        logits, vocab, width = 40 * self._randn(3, columns), 384, 391
        logits[1, vocab:] = float("-inf")
        found = logits.clone().to(self._device)
        out = torch.full((3, columns), float("nan"), dtype=self._dtype).to(self._device)

        Softcap(self._library, 30.0).launch(found, out, width=width, vocab=vocab)

        expected, own = logits.clone().div_(30.0).tanh_().mul_(30.0), out.cpu()
        yield "vocabulary", own[:, :vocab], expected[:, :vocab]
        yield "added tokens", own[::2, vocab:width], expected[::2, vocab:width]
        assert own[1, vocab:width].isneginf().all(), "a token that the row lacks can be drawn"
        assert own[:, width:].isnan().all(), "a column beyond the width was written"
        assert torch.equal(found.cpu(), logits), "the input was changed"
