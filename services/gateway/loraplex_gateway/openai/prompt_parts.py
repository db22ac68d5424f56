"""What an answer says about its prompt: its text, its tokens, their log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraplex_gateway.openai.logprobs import Json, completion_logprobs, completion_token, json_logprob

if TYPE_CHECKING:
    from loraplex_gateway.openai.convert import Plan
    from loraplex_gateway.types import PositionLogprobs, Started


def echoed_text(started: Started | None) -> str:
    """Return the prompt's text if the answer begins with it."""
    return started.prompt_text.text if started is not None and started.prompt_text is not None else ""


def echoed_logprobs(started: Started, num_top: int) -> Json:
    """Return a prompt's log-probabilities as those of a completion: its first token has none."""
    prompt = started.prompt_text
    assert prompt is not None  # what is echoed was asked for
    rest = completion_logprobs(started.prompt_logprobs, num_top)
    return {
        "tokens": [completion_token(prompt.first_token), *rest["tokens"]],
        "token_logprobs": [None, *rest["token_logprobs"]],
        "top_logprobs": [None, *rest["top_logprobs"]],
        "text_offset": list(prompt.offsets),
    }


def joined(prompt: Json, output: Json | None) -> Json:
    """Return the log-probabilities of a prompt and of the output behind it."""
    return prompt if output is None else {name: [*prompt[name], *output[name]] for name in prompt}


def prompt_fields(plan: Plan, started: Started) -> Json:
    """Return what vLLM's answers have about a prompt, as far as it was asked for."""
    fields: Json = {}
    if plan.return_token_ids:
        fields["prompt_token_ids"] = list(started.prompt_token_ids)
    if plan.prompt_logprobs is not None:
        num_top = plan.prompt_logprobs
        fields["prompt_logprobs"] = [None, *(_by_token(entry, num_top) for entry in started.prompt_logprobs)]
    return fields


def _by_token(entry: PositionLogprobs, num_top: int) -> dict[str, Any]:
    """Return token id -> log-probability, the likeliest first; the rank of a token beyond them is not known."""
    found = {}
    for rank, token in enumerate(entry.top[:num_top], start=1):
        found[str(token.token_id)] = {"logprob": json_logprob(token), "rank": rank, "decoded_token": token.text}
    chosen = entry.chosen
    if str(chosen.token_id) not in found:
        found[str(chosen.token_id)] = {"logprob": json_logprob(chosen), "rank": None, "decoded_token": chosen.text}
    return found
