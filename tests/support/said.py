"""Outputs of an engine double that are texts of a test's own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from support.gateway_rig import model_directory
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loraplex.v1 import engine_pb2


@functools.cache
def tokenizer() -> Tokenizer:
    """Return the tokenizer of the rig's base model."""
    return Tokenizer.from_file(str(model_directory() / "tokenizer.json"))


def saying(text: str) -> Callable[[engine_pb2.Submit], Sequence[int]]:
    """Return a reply that is always one text."""
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    return lambda _: ids
