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
        inside = token_ids.clamp(max=len(embedding) - 1)
        total = embedding.index_select(0, inside).float()
        mine = [(each.table.outside.embed, each) for each in self._segments if each.table.outside is not None]
        for module, segment in mine:
            if module is not None and module.pair is not None:
                tokens = inside[segment.tokens]
                _add_embeddings(module.pair, self._pool, tokens, total[segment.tokens], segment.scales)
        out.copy_(total)
        for module, segment in mine:
            if module is not None and module.rows is not None:
                _replace_embeddings(module.rows, self._pool, token_ids[segment.tokens], out[segment.tokens])

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
        found = [(module, *self._rows_of(segment, positions)) for module, segment in self._heads()]
        pairs = [(module.pair, rows, scales) for module, rows, scales in found if module.pair is not None and len(rows)]
        if pairs:
            total = wide.float()
            for pair, rows, scales in pairs:
                _add_logits(pair, total, x.index_select(0, rows).float(), rows, scales)
            wide.copy_(total)
        for module, rows, _ in found:
            if module.rows is not None and len(rows):
                _replace_logits(module.rows, wide, x.index_select(0, rows).float(), rows)
        return wide

    def _heads(self) -> list[tuple[OutsideModule, Segment]]:
        views = ((each.table.outside, each) for each in self._segments)
        return [(view.head, segment) for view, segment in views if view is not None and view.head is not None]

    def _rows_of(self, segment: Segment, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Return which of some tokens are a segment's, int64, and their requests' own factors."""
        mine = np.flatnonzero((positions >= segment.tokens.start) & (positions < segment.tokens.stop))
        device = self._pool.device
        within = torch.from_numpy(positions[mine] - segment.tokens.start).to(device)
        scales = None if segment.scales is None else segment.scales.index_select(0, within)
        return torch.from_numpy(mine).to(device), scales

    def logits_of_row(
        self, base: Callable[[Tensor], tuple[Tensor, Tensor]], finish: Callable[[Tensor], Tensor], position: int
    ) -> Callable[[Tensor], Tensor] | None:
        """Return what computes logits of hidden states under the adapters of one token; None if it has none with logits.

        Args:
            base: Hidden states ``[n, hidden]`` -> lm_head's input and output.
            finish: lm_head's output with the adapters' -> the model's logits.
            position: The token's place in the step.
        """
        if not any(segment.tokens.start <= position < segment.tokens.stop for segment in self._segments):
            return None

        def compute(hidden: Tensor) -> Tensor:
            x, logits = base(hidden)
            return finish(self.logits(logits, x, np.full(len(hidden), position, dtype=np.int64)))

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


def _replace_logits(view: RowsView, logits: Tensor, own: Tensor, rows: Tensor) -> None:
    """Write the logits of an adapter's rows; ``own`` fp32 ``[rows, hidden]`` is lm_head's input of these rows."""
    for first, last, values in view.pieces:
        columns = own @ values.float().t()
        logits[rows[:, None], view.ids[None, first:last]] = columns.to(logits.dtype)


def _add_logits(pair: PairView, total: Tensor, own: Tensor, rows: Tensor, scales: Tensor | None) -> None:
    """Add ``s * B A h`` to some rows of fp32 ``[S, columns]``."""
    shrunk = sum(own[:, start:stop] @ a.float().t() for start, stop, a in pair.a)
    assert isinstance(shrunk, Tensor)
    if scales is not None:
        shrunk.mul_(scales[:, None])
    for start, stop, b in pair.b:
        part = total[:, start:stop]
        part.index_copy_(0, rows, part.index_select(0, rows).addmm_(shrunk, b.float().t(), alpha=pair.scaling))
