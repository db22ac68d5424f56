"""A prompt as text, with the place of each of its tokens, for answers that begin with their prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_gateway.text.detokenizer import make_detokenizer
from loraplex_gateway.types import PromptText, TextPrompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.text.token_table import TokenTable
    from loraplex_gateway.types import Prompt


def prompt_text(table: TokenTable, prompt: Prompt, token_ids: Sequence[int], *, is_whole: bool) -> PromptText:
    """Return a prompt's text as it was sent; of token ids, and of a prompt that was cut, what the tokens stand for.

    Args:
        table: The model's tokens.
        prompt: As it was sent.
        token_ids: Its tokens.
        is_whole: Whether they are all of its tokens.
    """
    shown = _decoded(table, token_ids, skip_special_tokens=False)
    if not (is_whole and isinstance(prompt, TextPrompt)) or shown.text == prompt.text:
        return shown
    # The tokenizer wrote special tokens around the text. If more differs, the tokenizer reads texts that differ as equal:
    # the places are those in its own reading.
    bare = _decoded(table, token_ids, skip_special_tokens=True)
    return replace(bare, text=prompt.text, offsets=tuple(min(at, len(prompt.text)) for at in bare.offsets))


def _decoded(table: TokenTable, token_ids: Sequence[int], *, skip_special_tokens: bool) -> PromptText:
    detokenizer = make_detokenizer(table, skip_special_tokens=skip_special_tokens, prompt_ids=())
    pieces: list[str] = []
    offsets: list[int] = []
    num_characters = 0
    for token_id in token_ids:
        offsets.append(num_characters + detokenizer.num_held)
        pieces.append(detokenizer.push(token_id))
        num_characters += len(pieces[-1])
    text = "".join((*pieces, detokenizer.flush()))
    return PromptText(text=text, offsets=tuple(offsets), first_token=table.token_bytes(token_ids[0]))
