"""The numbers allowed in a request: gateway and engine check them against this one table; gateway.proto states it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

MAX_INT32: Final = 2**31 - 1
MAX_WAIT_S: Final = 7 * 86400.0
# A prompt's probabilities are sent in one message of at most 4 MiB, each with its token's text.
MAX_PROMPT_LOGPROBS: Final = 100_000
# Limit of the turns of a conversation; a template is run over each of them.
MAX_MESSAGES: Final = 16_384
# Adapters of one request: each has its own pages, and its own products in every layer.
MAX_ADAPTERS: Final = 8
# A constraint's text: schemas of thousands of fields are a few hundred KiB.
MAX_CONSTRAINT_BYTES: Final = 512 * 1024
MAX_CONSTRAINT_DEPTH: Final = 128
MAX_CHOICES: Final = 1024
MAX_BAD_WORD_BYTES: Final = 256


NOTHING_LEFT: Final = (
    "no token can be drawn: until min_new_tokens stop and end-of-text tokens are banned, and no others are allowed; allow "
    "another, set min_new_tokens to 0, or set ignore_eos where it is the end of text"
)


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, written ``[low, high]``, or ``(low, high]`` if `low` itself is not allowed."""

    low: float
    high: float
    excludes_low: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether the value is in the range; NaN never is."""
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
    "max_new_tokens": Range(1, MAX_INT32),  # of a gateway 0 as well, see `loraplex_gateway.requests.validation`
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
    "bad_words": 64,
    "stop_strings": 16,
    "stop_token_ids": 64,
}


def leaves_nothing(
    *, allowed_token_ids: Collection[int], banned_token_ids: Collection[int], min_new_tokens: int, vocab_size: int
) -> bool:
    """Return whether a request bans every token.

    A bias only makes tokens unlikely, at most by 100, so this is the only way to ban all of them.

    Args:
        allowed_token_ids: Tokens that may be drawn; empty allows all.
        banned_token_ids: Tokens that may not end the output yet.
        min_new_tokens: They are banned while the output has fewer tokens than this.
        vocab_size: Ids below it belong to the model.
    """
    if min_new_tokens == 0:
        return False
    allowed = set(allowed_token_ids)
    banned = set(banned_token_ids)
    return allowed <= banned if allowed else len(banned) >= vocab_size
