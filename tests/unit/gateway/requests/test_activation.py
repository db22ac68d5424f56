"""Where an activated adapter begins to apply to a prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.errors import InvalidParameterError
from loraplex_common.text_parts import TextParts
from loraplex_gateway.requests.activation import adapter_start, last_occurrence

ids = st.integers(0, 2)


def model(*sequence: int) -> Any:
    return SimpleNamespace(text_parts=TextParts(invocation_token_ids=sequence))


ADAPTER: Any = SimpleNamespace(name="judge")


@given(sequence=st.lists(ids, max_size=3), tokens=st.lists(ids, max_size=12))
def test_the_last_of_all_occurrences_counts(sequence: list[int], tokens: list[int]) -> None:
    places = [at for at in range(len(tokens)) if sequence and tokens[at : at + len(sequence)] == sequence]

    assert last_occurrence(sequence, tokens) == (places[-1] if places else None)


def test_a_prompt_without_the_sequence_is_refused_by_name() -> None:
    with pytest.raises(
        InvalidParameterError, match=r"adapter judge is activated by the tokens \[5, 6\].*do not contain"
    ):
        adapter_start(model(5, 6), [ADAPTER], [5, 7, 6])


def test_other_adapters_and_the_base_model_have_no_start() -> None:
    assert adapter_start(model(), [ADAPTER], [1, 2]) is None
    assert adapter_start(model(1), [], [1, 2]) is None
    assert adapter_start(model(1), [ADAPTER], [1, 2, 1, 3]) == 2
