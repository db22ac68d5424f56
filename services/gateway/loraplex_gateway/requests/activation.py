"""Where in a prompt an activated adapter (aLoRA, arXiv:2504.12397) begins to apply.

Such an adapter brings a sequence of invocation tokens with its revision. What stands before the last occurrence of the
sequence in the prompt is computed by the base model, and shares its cached prefixes; the adapter applies from the first
token of that occurrence on, as in PEFT. The place is fixed here, before any engine hears of the request: tokens that are
generated never move it, and an engine that takes a broken stream over is told the same place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.adapters.names import ResolvedAdapter
    from loraplex_gateway.text.models import ServedModel


def last_occurrence(sequence: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Return where a sequence begins for the last time in tokens; None if it is not in them."""
    length = len(sequence)
    if not 0 < length <= len(tokens):
        return None
    array = np.fromiter(tokens, np.int64, count=len(tokens))
    matches = array[: len(array) - length + 1] == sequence[0]
    for offset in range(1, length):
        matches &= array[offset : len(array) - length + 1 + offset] == sequence[offset]
    found = np.flatnonzero(matches)
    return int(found[-1]) if found.size else None


def adapter_start(model: ServedModel, adapters: Sequence[ResolvedAdapter], prompt_ids: Sequence[int]) -> int | None:
    """Return the first token of a prompt that its adapter applies to; None if it is none that a sequence activates.

    Args:
        model: The base model, as the adapter speaks.
        adapters: The adapter; none for the base model. Several have no sequence.
        prompt_ids: The prompt.

    Raises:
        InvalidParameterError: If the prompt lacks the adapter's sequence: the base model alone would answer.
    """
    sequence = model.text_parts.invocation_token_ids
    if not adapters or not sequence:
        return None
    start = last_occurrence(sequence, prompt_ids)
    if start is None:
        raise InvalidParameterError(
            f"adapter {adapters[0].name} is activated by the tokens {list(sequence)}, which the prompt's {len(prompt_ids)} tokens do "
            "not contain, so the base model alone would answer: end the prompt with the adapter's invocation text, or ask the "
            "base model",
            field="prompt",
        )
    return start
