"""Steps with adapters of the embedding and of lm_head, in torch.

For a token t of such an adapter, in the order of ADR 26:

    x = values[i] where ids[i] == t, else E[t] + s * B A[:, t]        embedding
    logit[t] = values[i] . h where ids[i] == t, else (W h + s * B A h)[t]        lm_head

in fp32, with one rounding at the end. An added token, behind the base's vocabulary, has its values alone; logits of such tokens
are -inf for rows whose adapter has no values of them. Rows of other adapters and of the base are computed as in steps without
such adapters.

Sources: LoRA of embeddings, Hu et al., arXiv:2106.09685; rows as values, PEFT's ``modules_to_save`` and
``trainable_token_indices``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from loraplex_engine.runners.torch.adapter_table import AdapterTable
    from loraplex_engine.runners.torch.outside_views import OutsideModule, PairView, RowsView


class Segment(Protocol):
    """Tokens of a step with one adapter, as far as it matters here; see `lora.Segment`.

    Attributes:
        table: The adapter.
        scales: fp32 ``[tokens]``, the requests' own factors; None if all are 1.
        tokens: The tokens' places in the step.
    """

    table: AdapterTable
    scales: Tensor | None
    tokens: slice[int, int, None]


class OutsideStep:
    """The adapters of one step that do something outside of the decoder layers.

    Args:
        segments: Segments of such adapters; several may cover one token.
        pool: The whole pool in the compute dtype, one-dimensional.
        num_columns: Tokens that the step's logits have columns for.
    """

    def __init__(self, segments: Sequence[Segment], pool: Tensor, num_columns: int) -> None:
        self._segments, self._pool, self._num_columns = segments, pool, num_columns

    def embed(self, token_ids: Tensor, embedding: Tensor, out: Tensor) -> None:
        """Write the step's embeddings.

        Args:
            token_ids: int64 ``[T]``.
            embedding: ``[vocab, hidden]``.
            out: ``[T, hidden]``.
        """
        vocab_size = len(embedding)
        out.copy_(embedding.index_select(0, token_ids.clamp(max=vocab_size - 1)))
        for segment in self._segments:
            views = segment.table.outside
            if views is None or views.embed is None:
                continue
            tokens, rows = token_ids[segment.tokens], out[segment.tokens]
            if views.embed.pair is not None:
                total = rows.float()
                inside = tokens.clamp(max=vocab_size - 1)
                _add_embeddings(views.embed.pair, self._pool, inside, total, segment.scales)
                rows.copy_(total)
            if views.embed.rows is not None:
                _replace_embeddings(views.embed.rows, self._pool, tokens, rows)

    def logits(self, logits: Tensor, x: Tensor, positions: NDArray[np.int64]) -> Tensor:
        """Return the logits of some tokens of the step under their adapters, ``[S, columns]``.

        Args:
            logits: ``[S, vocab]``; the base's; overwritten.
            x: ``[S, hidden]``; what lm_head has as input.
            positions: int64 ``[S]``; the tokens' places in the step.
        """
        vocab_size = logits.shape[1]
        wide = logits
        if self._num_columns > vocab_size:
            wide = logits.new_full((len(logits), self._num_columns), float("-inf"))
            wide[:, :vocab_size] = logits
        for segment in self._segments:
            views = segment.table.outside
            mine = np.flatnonzero((positions >= segment.tokens.start) & (positions < segment.tokens.stop))
            if views is not None and views.head is not None and mine.size:
                within = torch.from_numpy(positions[mine] - segment.tokens.start).to(x.device)
                scales = None if segment.scales is None else segment.scales.index_select(0, within)
                _edit_logits(views.head, wide, x, torch.from_numpy(mine).to(x.device), scales)
        return wide

    def logits_of_row(
        self, base: Callable[[Tensor], tuple[Tensor, Tensor]], position: int
    ) -> Callable[[Tensor], Tensor] | None:
        """Return what computes logits of hidden states under the adapters of one token; None if it has none with logits.

        Args:
            base: Hidden states ``[n, hidden]`` -> lm_head's input and the base's logits.
            position: The token's place in the step.
        """
        if not any(segment.tokens.start <= position < segment.tokens.stop for segment in self._segments):
            return None

        def compute(hidden: Tensor) -> Tensor:
            x, logits = base(hidden)
            return self.logits(logits, x, np.full(len(hidden), position, dtype=np.int64))

        return compute


def _add_embeddings(pair: PairView, pool: Tensor, tokens: Tensor, total: Tensor, scales: Tensor | None) -> None:
    """Add ``s * B A[:, t]`` to fp32 ``[n, hidden]``: columns of A are gathered from its tiles."""
    step = pair.widths[0]
    tile, within = tokens // step, tokens % step
    ranks = torch.arange(pair.rank, device=tokens.device)
    places = (pair.begins[tile] + within)[:, None] + ranks * pair.widths[tile][:, None]
    shrunk = pool[places].float()
    if scales is not None:
        shrunk.mul_(scales[:, None])
    for start, stop, b in pair.b:
        total[:, start:stop].addmm_(shrunk, b.float().t(), alpha=pair.scaling)


def _replace_embeddings(view: RowsView, pool: Tensor, tokens: Tensor, rows: Tensor) -> None:
    at = torch.searchsorted(view.ids, tokens).clamp_(max=len(view.ids) - 1)
    mine = (view.ids[at] == tokens).nonzero()[:, 0]
    if mine.numel():
        places = view.begins[at[mine]][:, None] + torch.arange(rows.shape[1], device=tokens.device)
        rows.index_copy_(0, mine, pool[places])


def _edit_logits(head: OutsideModule, logits: Tensor, x: Tensor, rows: Tensor, scales: Tensor | None) -> None:
    """Make some rows' logits their adapter's, in place."""
    own = x.index_select(0, rows).float()
    if head.pair is not None:
        _add_logits(head.pair, logits, own, rows, scales)
    if head.rows is not None:
        for first, last, values in head.rows.pieces:
            columns = own @ values.float().t()
            logits[rows[:, None], head.rows.ids[None, first:last]] = columns.to(logits.dtype)


def _add_logits(pair: PairView, logits: Tensor, own: Tensor, rows: Tensor, scales: Tensor | None) -> None:
    shrunk = sum(own[:, start:stop] @ a.float().t() for start, stop, a in pair.a)
    assert isinstance(shrunk, Tensor)
    if scales is not None:
        shrunk.mul_(scales[:, None])
    for start, stop, b in pair.b:
        part = logits[:, start:stop]
        total = part.index_select(0, rows).float().addmm_(shrunk, b.float().t(), alpha=pair.scaling)
        part.index_copy_(0, rows, total.to(part.dtype))
