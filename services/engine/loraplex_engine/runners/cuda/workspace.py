"""The largest step of an engine, and the activations that it needs: all buffers allocated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from loraplex_engine.runners.cuda.fp8_inputs import padded_rows

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from loraplex_common.decoder_config import ModelConfig
    from torch import Tensor

    from loraplex_engine.limits import EngineLimits

COLUMN_STEP: Final = 64
"""Rows of logits with tokens that adapters add begin on 128 bytes in bf16, whatever the number of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LargestStep:
    """Sizes of the largest step that the buffers hold; follows from `EngineLimits` and the sizes of the graphs.

    Attributes:
        max_tokens: Tokens of one step, decode bucket sizes included.
        max_rows: Decode rows of one step, bucket sizes included; also most sampling rows.
        max_context: Longest sequence, in tokens.
        max_added_tokens: Tokens that adapters may add behind the base's vocabulary.
    """

    max_tokens: int
    max_rows: int
    max_context: int
    max_added_tokens: int = 0

    @classmethod
    def of(cls, limits: EngineLimits, geometry: Geometry, *, max_rows: int) -> LargestStep:
        """Return the largest step of an engine whose largest graph has so many rows."""
        can_add = bool(limits.max_resident_adapters) and geometry.has_outside
        return cls(
            max_tokens=max(limits.max_num_batched_tokens, max_rows),
            max_rows=max_rows,
            max_context=limits.max_model_len,
            max_added_tokens=limits.max_added_tokens if can_add else 0,
        )

    def num_columns(self, vocab_size: int) -> int:
        """Return the columns of the buffer for logits: the vocabulary, all tokens that may be added, and what aligns rows."""
        if self.max_added_tokens == 0:
            return vocab_size
        return -(-(vocab_size + self.max_added_tokens) // COLUMN_STEP) * COLUMN_STEP


class Workspace:
    """Activations of the largest step; smaller steps use their first rows, so addresses never change.

    Attributes:
        hidden: The residual stream.
        x: Normed input of qkv and gate_up, and of lm_head.
        qkv, attended, gate_up, act: Along a layer; ``projected``: scratch of o and down, see `scratch`.
        logits: ``[max_rows, columns]``, see `LargestStep.num_columns`; lm_head writes the first ``vocab`` columns.
    """

    def __init__(self, config: ModelConfig, limits: LargestStep, *, dtype: torch.dtype, device: torch.device) -> None:
        def buffer(rows: int, columns: int) -> Tensor:  # FP8 products compute a few rows more
            return torch.zeros(padded_rows(rows), columns, dtype=dtype, device=device)

        tokens, hidden = limits.max_tokens, config.hidden_size
        self.hidden = buffer(tokens, hidden)
        self.x = buffer(tokens, hidden)
        self.qkv = buffer(tokens, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        self.attended = buffer(tokens, config.num_heads * config.head_dim)
        fits_gate_up = 2 * config.intermediate_size >= hidden
        self.projected = buffer(limits.max_rows if fits_gate_up else tokens, hidden)
        self.gate_up = buffer(tokens, 2 * config.intermediate_size)
        self.act = buffer(tokens, config.intermediate_size)
        self.logits = buffer(limits.max_rows, limits.num_columns(config.vocab_size))

    def scratch(self, tokens: int) -> Tensor:
        """Return the scratch of o and down, ``[tokens, hidden]``.

        More tokens than decode steps have take gate_up's memory: from o's product to the norm behind it, and from down's to the
        next layer's, nothing else is in it.
        """
        if tokens <= len(self.projected):
            return self.projected[:tokens]
        hidden = self.projected.shape[1]
        return self.gate_up.view(-1)[: tokens * hidden].view(tokens, hidden)
