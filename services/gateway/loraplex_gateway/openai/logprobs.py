"""Log-probabilities as OpenAI's two kinds of answers have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.types import PositionLogprobs, TokenLogprob

Json = dict[str, Any]
MIN_LOGPROB: Final = -9999.0


def chat_logprob(entry: PositionLogprobs, num_top: int) -> Json:
    """Return one position of a chat's answer."""
    return {**_chat_token(entry.chosen), "top_logprobs": [_chat_token(token) for token in entry.top[:num_top]]}


def _chat_token(token: TokenLogprob) -> Json:
    return {"token": token.text, "logprob": json_logprob(token), "bytes": list(token.data)}


def completion_logprobs(entries: Sequence[PositionLogprobs], num_top: int, *, num_before: int = 0) -> Json:
    """Return the positions of a completion, whose text has so many characters of an echoed prompt before them."""
    return {
        "tokens": [completion_token(entry.chosen.data) for entry in entries],
        "token_logprobs": [json_logprob(entry.chosen) for entry in entries],
        "top_logprobs": [_completion_alternatives(entry, num_top) for entry in entries],
        "text_offset": [num_before + entry.text_offset for entry in entries],
    }


def json_logprob(token: TokenLogprob) -> float:
    """Return the log-probability as OpenAI's API has it: JSON has no minus infinity, and its field is no optional."""
    return max(token.logprob, MIN_LOGPROB)


def completion_token(data: bytes) -> str:
    """Return a token as /v1/completions names it: its text, or its bytes if they are only part of a character."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in data)


def _completion_alternatives(entry: PositionLogprobs, num_top: int) -> dict[str, float]:
    """Return the likeliest tokens and the drawn one; of several with one name the likeliest counts."""
    alternatives: dict[str, float] = {}
    for token in (*entry.top[:num_top], entry.chosen):
        alternatives.setdefault(completion_token(token.data), json_logprob(token))
    return alternatives
