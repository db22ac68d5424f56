"""Tokens that an adapter's tokenizer has and its base model's has not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ADDED_TOKENS: Final = 1024
"""Tokens that an adapter may add to its base model's."""
MAX_ADDED_TOKEN_BYTES: Final = 256
"""Bytes in UTF-8 of an added token's text."""
FLAGS: Final = ("special", "normalized", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedToken:
    """A token that is looked for in a text before all others.

    Source of the flags: https://huggingface.co/docs/tokenizers/api/added-tokens

    Attributes:
        id: Its id. Below the base model's vocabulary size it has a row in the base's weights, though the base's tokenizer does
            not know it; from there on only the adapter has one.
        content: Its text.
        special: Whether it is left out where special tokens are.
        normalized: Whether it is looked for in the normalised text.
        lstrip: Whether it takes the spaces before it along.
        rstrip: Whether it takes those behind it along.
        single_word: Whether it is not found inside of words.
    """

    id: int
    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def to_fields(self) -> dict[str, Any]:
        """Return it for JSON, with the flags that are set."""
        return {"id": self.id, "content": self.content} | {name: True for name in FLAGS if getattr(self, name)}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> AddedToken:
        """Read what `to_fields` returned.

        Raises:
            TypeError: If there is a field that this version does not know.
        """
        return cls(**fields)
