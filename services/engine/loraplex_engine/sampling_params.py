"""How a request draws and where its output ends, with the limits that a backend must have room for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from loraplex_common.request_limits import MAX_ENTRIES, RANGES

MAX_LOGPROBS: Final = int(RANGES["logprobs"].high)
MAX_BIASED_TOKENS: Final = max(MAX_ENTRIES["logit_bias"], MAX_ENTRIES["allowed_token_ids"])
MAX_STOP_TOKENS: Final = MAX_ENTRIES["stop_token_ids"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a request draws; ranges as in gateway.proto, validated by the servicer."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    num_logprobs: int = -1
    prompt_logprobs: int = -1

    @property
    def uses_penalties(self) -> bool:
        """True if the tokens so far change the next draw."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class AddedTokenId(NamedTuple):
    """The largest id of a request's field, if it is behind the base's vocabulary: the request's adapter must add it."""

    field: str
    token_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingParams:
    """Where a request's output ends.

    Attributes:
        max_new_tokens: Most resumed and new tokens together; None means all that max_model_len leaves.
        stop_token_ids: Stop tokens besides the model's end-of-text ids.
        ignore_eos: Whether end-of-text ids (not stop_token_ids) are ordinary tokens.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
