"""Functions for models whose chat template has no place for them: in words, with the tags that Hermes' models know."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.text.chat_messages import Turn

_OFFER: Final = (
    "You can call the functions that are described here as JSON, one per line:\n<tools>\n{tools}\n</tools>\n\n"
    "To call a function, answer with a JSON object of its name and arguments between tags, and nothing after it:\n"
    '<tool_call>\n{{"name": "function-name", "arguments": {{"argument-name": "value"}}}}\n</tool_call>\n'
    "The result comes in <tool_response> tags."
)


def in_words(turns: Sequence[Turn], tools: Sequence[Turn]) -> list[Turn]:
    """Return a conversation of plain turns: functions in the system's, calls in the assistant's, results in the user's.

    Results in a row are one turn, as many templates have users and assistants alternate.
    """
    plain: list[Turn] = []
    if tools:
        plain.append({"role": "system", "content": _OFFER.format(tools="\n".join(_json(tool) for tool in tools))})
    for turn in turns:
        if tools and turn["role"] == "system" and len(plain) == 1:
            plain[0] = {**turn, "content": f"{turn['content']}\n\n{plain[0]['content']}".lstrip()}
        elif turn["role"] == "tool":
            _add_result(plain, turn["content"])
        elif turn.get("tool_calls"):
            calls = [f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in turn["tool_calls"]]
            said = [turn["content"]] if turn["content"] else []
            rest = {key: value for key, value in turn.items() if key != "tool_calls"}
            plain.append({**rest, "content": "\n".join([*said, *calls])})
        else:
            plain.append(dict(turn))
    return plain


def _add_result(plain: list[Turn], content: str) -> None:
    result = f"<tool_response>\n{content}\n</tool_response>"
    if plain and plain[-1].get("role") == "user" and plain[-1]["content"].endswith("</tool_response>"):
        plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{result}"}
    else:
        plain.append({"role": "user", "content": result})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
