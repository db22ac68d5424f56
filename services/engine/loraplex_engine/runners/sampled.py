"""The tokens that a sampler drew, and their probabilities, still on the device.

Legend: S = sampling rows, V = columns of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_engine.runners.philox import upload
from loraplex_engine.runners.slot_faults import SlotFaults
from loraplex_engine.runners.top_tokens import likeliest
from loraplex_engine.step import TokenLogprobs

NOT_FINITE: Final = 0
VALID: Final = 1
NOTHING_LEFT: Final = 2
"""What became of a draw; csrc/sampling/sample.cu says the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobRows:
    """Log probabilities of some rows, still on the device.

    Attributes:
        rows: Indices into the S rows.
        num_top: Per row, how many likeliest tokens were asked for.
        drawn: fp32 ``[rows]``; ``top`` and ``top_ids`` ``[rows, max(num_top)]``, best first.
    """

    rows: NDArray[np.int64]
    num_top: NDArray[np.int32]
    token_ids: Tensor
    drawn: Tensor
    top: Tensor
    top_ids: Tensor

    def to_host(self) -> dict[int, TokenLogprobs]:
        """Return row -> probabilities; waits for the device."""
        token_ids, drawn = self.token_ids.cpu().numpy(), self.drawn.cpu().numpy()
        top, top_ids = self.top.cpu().numpy(), self.top_ids.cpu().numpy()
        return {
            int(row): TokenLogprobs(
                token_ids=np.concatenate((token_ids[i : i + 1], top_ids[i, :k])).astype(np.int32),
                logprobs=np.concatenate((drawn[i : i + 1], top[i, :k])).astype(np.float32),
            )
            for i, (row, k) in enumerate(zip(self.rows, self.num_top, strict=True))
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """The drawn tokens, still on the device.

    Attributes:
        token_ids: int64 ``[S]``.
        outcomes: int32 ``[S]``; `VALID`, else the token means nothing: `NOTHING_LEFT` where masks and bans rule out every
            token, `NOT_FINITE` where the largest logit is NaN or infinite.
        logprobs: Probabilities of the rows that asked for them, in parts.
        faults: Slots whose request alone caused an exception; their tokens mean nothing.
    """

    token_ids: Tensor
    outcomes: Tensor
    logprobs: tuple[LogprobRows, ...] = ()
    faults: SlotFaults = field(default_factory=dict)

    @property
    def is_valid(self) -> Tensor:
        """Boolean ``[S]``; whether the row drew a token."""
        return self.outcomes == VALID

    def logprobs_to_host(self) -> dict[int, TokenLogprobs]:
        """Return row -> probabilities; waits for the device."""
        return {row: entry for part in self.logprobs for row, entry in part.to_host().items()}


def outcomes_of(best: Tensor) -> Tensor:
    """Return what becomes of draws whose largest logits are ``best``, ``[S]``, after masks and bans; int32 ``[S]``."""
    return torch.isfinite(best).to(torch.int32).masked_fill_(best == float("-inf"), NOTHING_LEFT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Masks:
    """Which tokens some rows may draw.

    Attributes:
        rows: int32 ``[M]``; indices into the S rows.
        words: int32 ``[M, words]``, on the sampler's device; bit ``t % 32`` of word ``t // 32``: token t may be drawn. Tokens
            behind the last word may not.
    """

    rows: NDArray[np.int32]
    words: Tensor

    def apply(self, logits: Tensor) -> None:
        """Make the logits ``[S, V]`` of tokens that may not be drawn -inf, in place."""
        bits = torch.arange(8, dtype=torch.uint8, device=self.words.device)
        by_byte = (self.words.view(torch.uint8)[:, :, None] >> bits) & 1
        is_banned = by_byte.view(len(self.words), -1)[:, : logits.shape[1]] == 0
        missing = logits.shape[1] - is_banned.shape[1]
        if missing > 0:
            is_banned = torch.nn.functional.pad(is_banned, (0, missing), value=True)
        rows = upload(self.rows.astype(np.int64), logits.device)
        logits[rows] = logits[rows].masked_fill(is_banned, float("-inf"))


def top_logprobs(
    logprobs: Tensor, token_ids: Tensor, rows: NDArray[np.int64], num_top: NDArray[np.int32]
) -> LogprobRows:
    """Pick the entries of given tokens and of the likeliest tokens.

    Args:
        logprobs: fp32 ``[rows, V]``.
        token_ids: int64 ``[rows]``.
        rows: The rows' numbers in the result.
        num_top: int32 ``[rows]``.
    """
    top, top_ids = likeliest(logprobs, min(int(num_top.max()), logprobs.shape[1]))
    drawn = logprobs.gather(1, token_ids[:, None])[:, 0]
    return LogprobRows(rows=rows, num_top=num_top, token_ids=token_ids, drawn=drawn, top=top, top_ids=top_ids)
