"""Tokens of a step that have one adapter, and what that does in a fused projection; `lora` computes with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from loraplex_engine.runners.torch.adapter_table import AdapterTable
    from loraplex_engine.runners.torch.adapter_views import AdapterOp


class Segment:
    """Tokens ``[first, last)`` of a step, all of one adapter.

    All layers share their input and output buffers, so the views that a tile needs are made once per step: making one
    costs as much as the small product it feeds.
    """

    def __init__(self, *, first: int, last: int, table: AdapterTable, scales: Tensor | None) -> None:
        """Describe a segment.

        Args:
            first: First token.
            last: One past the last token.
            table: The adapter.
            scales: fp32 ``[last - first]``, the requests' own factors; None if all are 1.
        """
        self.table = table
        self.scales = scales
        self.tokens = slice(first, last)
        self.num_tokens = last - first
        self._inputs: list[dict[int, Tensor]] = [{} for _ in range(table.num_ops)]
        self._outputs: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(table.num_ops)]

    def input_of(self, op: int, x: Tensor, start: int, stop: int) -> Tensor:
        """Return columns [start, stop) of the segment's rows of an op's input, transposed: ``[stop - start, tokens]``."""
        key = start << 32 | stop
        view = self._inputs[op].get(key)
        if view is None:
            view = self._inputs[op][key] = x[self.tokens, start:stop].t()
        return view

    def output_of(self, op: int, y: Tensor, start: int, stop: int) -> Tensor:
        """Return columns [start, stop) of the segment's rows of an op's output, transposed: ``[stop - start, tokens]``."""
        key = (start, stop)
        view = self._outputs[op].get(key)
        if view is None:
            view = self._outputs[op][key] = y[self.tokens, start:stop].t()
        return view


class Term(NamedTuple):
    """What a segment's adapter does in one op of one layer."""

    adapter: AdapterOp
    segment: Segment
