"""How many tokens a prompt and its output have together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.errors import ContextLengthError, InvalidParameterError
from loraplex_common.request_limits import MAX_PROMPT_LOGPROBS

if TYPE_CHECKING:
    from loraplex_gateway.types import GenerationRequest


def truncated(ids: tuple[int, ...], request: GenerationRequest, max_model_len: int) -> tuple[int, ...]:
    """Return a prompt's tokens, cut to the length that the request wants: at its beginning unless told otherwise."""
    most = request.truncate_prompt_tokens
    if most is None:
        return ids
    if most == -1:
        # At least one token of the prompt is kept: what has no room at all is refused for its length.
        most = max(1, max_model_len - max(1, request.stopping.max_new_tokens or 1))
    return ids[:most] if request.truncates_end else ids[-most:]


def check_length(num_prompt_tokens: int, max_new_tokens: int | None, max_model_len: int) -> None:
    """Refuse a request for more tokens than a sequence can have; it must leave room for one that is drawn.

    Raises:
        ContextLengthError: With the arithmetic.
    """
    wanted = 1 if max_new_tokens is None else max_new_tokens
    total = num_prompt_tokens + wanted
    if num_prompt_tokens + max(1, wanted) <= max_model_len:
        return
    if wanted == 0:
        total += 1  # a sequence has room for one token that is drawn, wanted or not
    room = max_model_len - num_prompt_tokens
    remedy = f"ask for at most {room} output tokens or shorten" if room > 0 else "shorten"
    # Clients that cut their prompts and ask again know OpenAI's and vLLM's messages by these words.
    raise ContextLengthError(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {wanted} output tokens "
        f"and your prompt contains {num_prompt_tokens} input tokens, for a total of {total} tokens; {remedy} the prompt",
        field="stopping.max_new_tokens" if room > 0 else "prompt",
        metadata={"prompt_tokens": str(num_prompt_tokens), "max_model_len": str(max_model_len)},
    )


def check_prompt_logprobs(num_prompt_tokens: int, num_alternatives: int | None) -> None:
    """Refuse probabilities of a prompt that would not fit one message.

    Raises:
        InvalidParameterError: With the arithmetic.
    """
    if num_alternatives is None or num_prompt_tokens * (num_alternatives + 1) <= MAX_PROMPT_LOGPROBS:
        return
    raise InvalidParameterError(
        f"response_options.prompt_logprobs of {num_prompt_tokens} tokens x (1 drawn + {num_alternatives} likeliest) are more than "
        f"{MAX_PROMPT_LOGPROBS}; ask for fewer, or shorten the prompt",
        field="response_options.prompt_logprobs",
    )
