"""The token counts of an OpenAI answer."""

from __future__ import annotations

from loraplex_gateway.openai import fields
from loraplex_gateway.openai.convert import Plan
from loraplex_gateway.openai.errors import BodyNames
from loraplex_gateway.openai.render import Renderer
from loraplex_gateway.types import Finished, FinishReason, GenerationRequest, TextPrompt, Timings, Usage

FINISHED = Finished(
    finish_reason=FinishReason.STOP,
    usage=Usage(prompt_tokens=10, output_tokens=3, cached_tokens=8),
    timings=Timings(),
)


def test_the_choices_of_one_prompt_share_its_tokens_and_cached_tokens() -> None:
    request = GenerationRequest(prompt=TextPrompt(text="x"))
    plan = Plan(
        requests=(request, request),
        model="m",
        names=BodyNames(fields.COMPLETION),
        is_chat=False,
        is_stream=False,
        include_usage=False,
        has_running_usage=False,
        logprobs=None,
        return_token_ids=False,
    )

    usage = Renderer(plan, request_id="r").whole([[FINISHED], [FINISHED]])["usage"]

    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 6, 16)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 8}
