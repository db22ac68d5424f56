"""Whether an output begins with thoughts, seen from the prompt that it continues."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex_gateway.chat_output.formats import ThoughtTags
    from loraplex_gateway.types import ChatPrompt


class Thinking(enum.Enum):
    """What the prompt's end says of thoughts."""

    NONE = "it has closed them, or the model has none"
    OPEN = "it has opened them: the output begins within"
    POSSIBLE = "nothing: the output may open them"


def thinking_of(prompt: ChatPrompt, rendered: str, tags: ThoughtTags | None) -> Thinking:
    """Return what the end of a rendered prompt says; words of its messages never count."""
    if tags is None:
        return Thinking.NONE
    if prompt.continue_final_message:
        final = prompt.messages[-1].content
        is_open = final.rfind(tags.opening) > final.rfind(tags.closing)
        return Thinking.OPEN if is_open or rendered.rstrip().endswith(tags.opening) else Thinking.NONE
    if not prompt.add_generation_prompt:
        return Thinking.POSSIBLE
    end = rendered.rstrip()
    if end.endswith(tags.opening):
        return Thinking.OPEN
    return Thinking.NONE if end.endswith(tags.closing) else Thinking.POSSIBLE
