"""How the output of a request is taken apart, found out once its prompt is rendered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_gateway.chat_output.formats import output_format
from loraplex_gateway.chat_output.reading import chat_reading
from loraplex_gateway.types import ChatPrompt

if TYPE_CHECKING:
    from loraplex_gateway.chat_output.reading import ChatReading
    from loraplex_gateway.text.models import ServedModel
    from loraplex_gateway.text.tokenization import Encoded
    from loraplex_gateway.types import GenerationRequest


def reading_of(request: GenerationRequest, model: ServedModel, encoded: Encoded) -> ChatReading | None:
    """Return how the output of a chat is to be taken apart; None if it is not.

    Raises:
        InvalidParameterError: As of `chat_reading`.
    """
    prompt, template = request.prompt, encoded.template
    if request.parsing is None or not isinstance(prompt, ChatPrompt) or template is None:
        return None
    output = output_format(
        template.source, reads_tools=encoded.reads_tools, response_template=template.response_template
    )
    return chat_reading(
        prompt,
        request.parsing,
        output=output,
        rendered=encoded.rendered,
        token_id=model.tokenizer.token_id,
        base_token_id=model.tokenizer.base_token_id,
        constraint=request.structured_output,
    )
