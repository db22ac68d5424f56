"""One short text says what loading made of a base model's numbers."""

from __future__ import annotations

import pytest
from loraplex_common.numerics import Numerics


@pytest.mark.parametrize(
    ("numerics", "text"),
    [
        (Numerics(compute="bfloat16"), "bf16"),
        (Numerics(compute="float32"), "fp32"),
        (Numerics(compute="bfloat16", weights="unpacked:awq"), "bf16+unpacked:awq"),
        (Numerics(compute="bfloat16", weights="fp8-w8a8-dynamic", kv="fp8"), "bf16+fp8-w8a8-dynamic+kv:fp8"),
        (Numerics(compute="bfloat16", kv="fp8", rope="long"), "bf16+kv:fp8+rope:long"),
    ],
)
def test_the_text_names_what_is_not_the_plain_case(numerics: Numerics, text: str) -> None:
    assert str(numerics) == text


@pytest.mark.parametrize("part", ["", "a+b", "Fp8", "a b", "é", "a\n", "x" * 128])
def test_a_part_that_would_read_as_another_or_cannot_be_sent_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match="numerics"):
        Numerics(compute="bfloat16", weights=part)
