"""The computation of every kernel in plain torch and fp32: the oracle of the tests. Slow on purpose."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loraplex_kernels.attention.paged_kv import KvLayout


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None, *, offset: float = 0.0
) -> torch.Tensor:
    """Return ``(weight + offset) * v / sqrt(mean(v^2) + eps)`` with ``v = x + residual``; fp32 ``[rows, hidden]``.

    The sum is rounded to x's dtype first, since the next layer's residual holds it in that type.
    """
    value = x if residual is None else x + residual
    wide = value.float()
    return (weight.float() + offset) * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``gelu(gate) * up``, GELU in its approximation by tanh; fp32 ``[rows, width]``."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``; fp32 ``[rows, width]``."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rotary_table(positions: int, head_dim: int, theta: float = 10000.0) -> torch.Tensor:
    """Return fp32 ``[positions, head_dim]``: cosines of the half frequencies, then their sines."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def rope(x: torch.Tensor, rotary: torch.Tensor, positions: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Rotate heads ``[tokens, heads, head_dim]``; fp32.

    Args:
        x: The heads.
        rotary: ``[positions, rotary_dim]``, as `rotary_table` makes it; dims of a head from rotary_dim on stay as they are.
        positions: int ``[tokens]``.
        interleaved: Whether dims 2i and 2i + 1 are a pair, not i and i + rotary_dim / 2.
    """
    cosine, sine = rotary[positions.long()][:, None].chunk(2, dim=-1)
    wide, dim = x.float(), rotary.shape[1]
    out = wide.clone()
    pairs = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(0, dim // 2), slice(dim // 2, dim))
    low, high = wide[..., pairs[0]], wide[..., pairs[1]]
    out[..., pairs[0]], out[..., pairs[1]] = low * cosine - high * sine, high * cosine + low * sine
    return out


def lora_delta(x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``scale * (x A^T) B^T``; fp32 ``[tokens, out_features]``."""
    return scale * (x.float() @ lora_a.float().T) @ lora_b.float().T


def read_kv(
    pool: torch.Tensor, layout: KvLayout, dtype: torch.dtype, layer: int, pages: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather K and V of the first ``length`` tokens of a sequence; each ``[length, kv_heads, head_dim]``, as stored.

    Values in e4m3 are multiplied with their scales and rounded to ``dtype`` as the kernels do it.

    Args:
        pool: uint8 ``[pages, page_bytes]``.
        layout: Place of K and V in pages.
        dtype: Type of K and V.
        layer: Decoder layer.
        pages: int ``[>= blocks]``; the sequence's page ids.
        length: Tokens wanted.
    """
    if layout.scales_offset is not None:
        key, value = _read_fp8(pool, layout, layer, pages, length)
        return key.to(dtype), value.to(dtype)
    blocks = -(-length // layout.block_tokens)
    start = layout.layer_offset(layer, dtype.itemsize)
    count = 2 * layout.num_kv_heads * layout.block_tokens * layout.head_dim * dtype.itemsize
    raw = pool[pages[:blocks].long(), start : start + count].contiguous().view(dtype)
    shaped = raw.view(blocks, 2, layout.num_kv_heads, layout.block_tokens, layout.head_dim)
    key, value = shaped.permute(1, 0, 3, 2, 4).reshape(
        2, blocks * layout.block_tokens, layout.num_kv_heads, layout.head_dim
    )
    return key[:length], value[:length]


def _read_fp8(
    pool: torch.Tensor, layout: KvLayout, layer: int, pages: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, size, dim = layout.num_kv_heads, layout.block_tokens, layout.head_dim
    chosen = pool[pages[: -(-length // size)].long()]
    start, count = layout.layer_offset(layer, 1), 2 * heads * size * dim
    values = chosen[:, start : start + count].contiguous().view(torch.float8_e4m3fn)
    start = (layout.scales_offset or 0) + layer * heads * size * 4
    scales = chosen[:, start : start + heads * size * 4].contiguous().view(torch.bfloat16)
    wide = (
        values.view(-1, 2, heads, size, dim).float()
        * scales.view(-1, heads, size, 2).permute(0, 3, 1, 2)[..., None].float()
    )
    key, value = wide.permute(1, 0, 3, 2, 4).reshape(2, -1, heads, dim)
    return key[:length], value[:length]


def quantise_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K or V as e4m3, and bf16 scales ``[...]`` of its last dimension.

    Args:
        x: ``[..., head_dim]``.
    """
    most = x.float().abs().amax(-1)
    scales = (most * (1 / 448)).clamp(2.0**-100, 127.5).bfloat16()
    scales = torch.where(most.isfinite(), scales, math.nan)
    return (x.float() * (1 / scales.float())[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def attention(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    layout: KvLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of consecutive tokens of one sequence; fp32 ``[tokens, heads, head_dim]``.

    Args:
        q: ``[tokens, heads, head_dim]``; positions start, start + 1, ...
        key: ``[start + tokens, kv_heads, head_dim]``.
        value: The same shape as ``key``.
        start: Position of the first token.
        layout: Heads and window.
        scale: Factor on ``q k``; None for 1 / sqrt(head_dim).
        softcap: Bound of the scores; None for none.
    """
    group = layout.num_heads // layout.num_kv_heads
    wide_key, wide_value = (t.float().repeat_interleave(group, dim=1) for t in (key, value))
    scores = torch.einsum("thd,shd->hts", q.float(), wide_key)
    scores *= 1 / math.sqrt(layout.head_dim) if scale is None else scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query_at = torch.arange(start, start + len(q), device=q.device)[:, None]
    key_at = torch.arange(len(key), device=q.device)[None]
    hidden = key_at > query_at
    if layout.window:
        hidden |= key_at <= query_at - layout.window
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -math.inf).softmax(-1), wide_value)


def finish(
    y: torch.Tensor,
    c: torch.Tensor | None,
    b: torch.Tensor | None,
    base_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``c * (y - base_bias) + base_bias + b``; fp32 ``[tokens, out_features]``; what is None is left out."""
    value = y.float()
    kept = torch.zeros(y.shape[1], device=y.device) if base_bias is None else base_bias.float()
    if c is not None:
        value = c * (value - kept) + kept
    return value if b is None else value + b


def sparse_product(x: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return ``S x`` of a matrix by output row (CSR); fp32 ``[tokens, out_features]``.

    Args:
        x: ``[tokens, in_features]``.
        values: ``[nnz]``.
        columns: int ``[nnz]``.
        starts: int ``[out_features + 1]``; where each output's values begin.
    """
    outputs = torch.repeat_interleave(torch.arange(len(starts) - 1, device=x.device), starts.diff())
    products = values.float() * x.float()[:, columns]
    out = torch.zeros(len(x), len(starts) - 1, dtype=torch.float32, device=x.device)
    return out.index_add_(1, outputs, products)


def adapted_embedding(
    ids: torch.Tensor,
    table: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    pair: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Return the embeddings of tokens of one adapter; fp32 ``[tokens, hidden]``; ids without a row give zeros.

    Args:
        ids: int ``[tokens]``.
        table: ``[vocab, hidden]``.
        rows: Ids ``[n]`` and values ``[n, hidden]`` that stand in the place of the table's, without the pair's delta.
        pair: A ``[rank, vocab]``, B ``[hidden, rank]`` and the factor on B A[:, id].
    """
    is_known = (ids < len(table))[:, None]
    inside = ids.long().clamp(max=len(table) - 1)
    out = torch.where(is_known, table[inside].float(), torch.zeros((), device=table.device))
    if pair is not None:
        a, b, scale = pair
        out += torch.where(is_known, scale * a.float().T[inside] @ b.float().T, torch.zeros((), device=table.device))
    if rows is not None:
        for row, values in zip(rows[0].tolist(), rows[1], strict=True):
            out[ids == row] = values.float()
    return out


def adapted_logits(
    x: torch.Tensor,
    logits: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    pair: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Return the logits of tokens of one adapter; fp32, as wide as the base's with room for added tokens.

    Args:
        x: ``[tokens, hidden]``; lm_head's input.
        logits: ``[tokens, columns]``; the base's, -inf behind its vocabulary.
        rows: Ids ``[n]`` and values ``[n, hidden]`` whose products with x stand in the place of what is there.
        pair: A ``[rank, hidden]``, B ``[vocab, rank]`` and the factor on B A x.
    """
    out = logits.float().clone()
    if pair is not None:
        a, b, scale = pair
        out[:, : len(b)] += lora_delta(x, a, b, scale)
    if rows is not None:
        out[:, rows[0].long()] = x.float() @ rows[1].float().T
    return out


def fp8_product(
    x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """Return ``x @ weight.T`` of e4m3 numbers times their scales, in fp32.

    Args:
        x: ``[rows, inputs]``.
        x_scales: ``[1, rows]``, or ``[ceil(inputs / 128), rows]``.
        weight: ``[outputs, inputs]``.
        weight_scales: ``[outputs]``, or ``[ceil(outputs / 128), ceil(inputs / 128)]``.
    """
    outputs, inputs = weight.shape
    if weight_scales.dim() == 1:
        return (x.float() @ weight.float().t()) * x_scales.t() * weight_scales
    of_inputs = x_scales.t().repeat_interleave(128, 1)[:, :inputs]
    of_weight = weight_scales.repeat_interleave(128, 0)[:outputs].repeat_interleave(128, 1)[:, :inputs]
    return (x.float() * of_inputs) @ (weight.float() * of_weight).t()
