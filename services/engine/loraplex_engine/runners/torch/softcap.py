"""Attention with a soft cap of the scores, ``cap * tanh(score / cap)``, which torch's fused attention does not have.

Source: Gemma Team, "Gemma 2", arXiv:2408.00118, section 2.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MAX_SCORES: Final = 1 << 22
"""Scores that are held at once, in fp32: queries are attended in parts."""


def capped_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scale: float, cap: float
) -> Tensor:
    """Return attention, ``[heads, queries, head_dim]`` in the dtype of the values; scores are fp32.

    Args:
        queries: ``[kv_heads * G, n, head_dim]``.
        keys: ``[kv_heads, m, head_dim]``.
        values: ``[kv_heads, m, head_dim]``.
        mask: What a query attends to: boolean ``[n, m]``, or ``[kv_heads, n, m]`` in the dtype of the values, 0 or -inf.
            None is causal: n = m, and each query attends to the keys up to its own.
        scale: Factor of the scores.
        cap: The scaled scores stay between -cap and cap.
    """
    num_heads, num_queries, num_keys = queries.shape[0], queries.shape[1], keys.shape[1]
    group_size = num_heads // keys.shape[0]
    keys_t, wide_values = keys.float().transpose(1, 2), values.float()
    if mask is None:
        mask = torch.ones((num_queries, num_keys), dtype=torch.bool, device=queries.device).tril_()
    out = values.new_empty(queries.shape)
    step = max(1, MAX_SCORES // (num_heads * num_keys))
    for first in range(0, num_queries, step):
        part = queries[:, first : first + step].float()
        rows = part.shape[1]
        by_kv_head = part.reshape(-1, group_size * rows, part.shape[2])
        scores = torch.bmm(by_kv_head, keys_t).mul_(scale / cap).tanh_().mul_(cap)
        by_query = scores.view(-1, group_size, rows, num_keys)
        visible = mask[..., first : first + step, :]
        if visible.dtype == torch.bool:
            by_query.masked_fill_(~visible, float("-inf"))
        else:
            by_query.add_(visible[:, None])
        attended = torch.bmm(torch.softmax(scores, dim=-1), wide_values)
        out[:, first : first + step] = attended.view(num_heads, rows, -1)
    return out
