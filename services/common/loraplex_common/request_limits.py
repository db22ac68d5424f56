"""The numbers a request may hold: gateway and engine check them both, against this one table; gateway.proto states it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

MAX_INT32: Final = 2**31 - 1
MAX_WAIT_S: Final = 7 * 86400.0
# A prompt's probabilities travel in one message of at most 4 MiB, each with its token's text.
MAX_PROMPT_LOGPROBS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, written ``[low, high]``, or ``(low, high]`` if `low` itself is not one of them."""

    low: float
    high: float
    excludes_low: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether the value is one of them; NaN never is."""
        return (value > self.low if self.excludes_low else value >= self.low) and value <= self.high


RANGES: Final[Mapping[str, Range]] = {
    "temperature": Range(0, 100),
    "top_k": Range(-1, MAX_INT32),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "seed": Range(0, 2**64 - 1),
    "repetition_penalty": Range(0, 10, excludes_low=True),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "logit_bias": Range(-100, 100),
    "max_new_tokens": Range(1, MAX_INT32),
    "min_new_tokens": Range(0, MAX_INT32),
    "logprobs": Range(0, 20),
    "prompt_logprobs": Range(0, 20),
    "adapter_scale": Range(0, 100),
    "queue_timeout": Range(0, MAX_WAIT_S, excludes_low=True),
    "time_limit": Range(0, MAX_WAIT_S, excludes_low=True),
}
MAX_ENTRIES: Final[Mapping[str, int]] = {
    "logit_bias": 1024,
    "allowed_token_ids": 1024,
    "stop_strings": 16,
    "stop_token_ids": 64,
}


def nothing_to_draw(allowed: Collection[int], stops: Collection[int], min_new_tokens: int) -> str | None:
    """Return why no first token can be drawn, None if one can: below `min_new_tokens` what ends the output is forbidden.

    Args:
        allowed: Token ids that alone can be drawn; none means all.
        stops: Stop ids, and the model's end-of-text ids where they count.
        min_new_tokens: Tokens before which those cannot be drawn.
    """
    if not allowed or not min_new_tokens or not set(allowed) <= set(stops):
        return None
    return (
        "each of allowed_token_ids ends the output, and min_new_tokens forbids that for the first token; allow another "
        "token, or set min_new_tokens to 0"
    )
