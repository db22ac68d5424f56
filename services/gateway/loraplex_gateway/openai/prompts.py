"""The prompts of a completion's body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.types import TextPrompt, TokenPrompt

if TYPE_CHECKING:
    from loraplex_gateway.types import Prompt

MAX_CHOICES: Final = 128


def completion_prompts(prompt: str | list[Any], *, add_special_tokens: bool) -> list[Prompt]:
    """Return the prompts of the four shapes that OpenAI allows: text, texts, token ids, lists of token ids."""
    if isinstance(prompt, str):
        return [TextPrompt(text=prompt, add_special_tokens=add_special_tokens)]
    if not prompt:
        raise InvalidParameterError("the prompt is empty", field="prompt")
    if _are_token_ids(prompt):
        return [TokenPrompt(ids=tuple(prompt))]
    if len(prompt) > MAX_CHOICES:
        raise InvalidParameterError(
            f"prompt is a list of {len(prompt)} prompts; at most {MAX_CHOICES} are taken", field="prompt"
        )
    result: list[Prompt] = []
    for n, item in enumerate(prompt):
        if isinstance(item, str):
            result.append(TextPrompt(text=item, add_special_tokens=add_special_tokens))
        elif isinstance(item, list) and _are_token_ids(item):
            result.append(TokenPrompt(ids=tuple(item)))
        else:
            raise InvalidParameterError(
                f"prompt[{n}]: prompt must be text, token ids, or a list of either", field=f"prompt[{n}]"
            )
    return result


def _are_token_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)  # true and false are ints to Python
