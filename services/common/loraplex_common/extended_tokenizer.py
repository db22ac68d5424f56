"""A base model's tokenizer with an adapter's tokens added; the two share everything but the added tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import tokenizers
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loraplex_common.added_tokens import AddedToken

_GAP: Final = "\ue000unused token {}\ue000"
"""Text of an id in front of an added one that no token has: no prompt has it, as its first character is for private use."""


def extended_tokenizer(base: Tokenizer, added: Sequence[AddedToken]) -> Tokenizer:
    """Return a tokenizer that knows further tokens; ``base`` stays as it is.

    The library's parts are immutable here and shared: vocabulary and merges, which take nearly all of a tokenizer's memory,
    exist once. It gives ids in the order of adding, so ids in front of an added one that no token has get a token without a
    use (`gap_ids`), as transformers gives them a reserved one.

    Args:
        base: The base model's tokenizer.
        added: Tokens by ascending id.

    Raises:
        ValueError: If the library does not give a token its id, since another one has that.
    """
    extended = Tokenizer(base.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(base, part)) is not None:
            setattr(extended, part, value)
    known = base.get_added_tokens_decoder()
    extended.add_tokens([known[token_id] for token_id in sorted(known)])
    vocabulary_size = base.get_vocab_size(with_added_tokens=False)
    next_id = max(vocabulary_size, max(known, default=-1) + 1)
    tokens: list[tokenizers.AddedToken] = []
    for token in added:
        if token.id >= next_id:
            tokens += [_gap(token_id) for token_id in range(next_id, token.id)]
            next_id = token.id + 1
        tokens.append(_library_token(token))
    extended.add_tokens(tokens)
    _check_ids(extended, added, base)
    return extended


def gap_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of an extended tokenizer that no token of base or adapter has."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.content == _GAP.format(token_id))


def _check_ids(extended: Tokenizer, added: Iterable[AddedToken], base: Tokenizer) -> None:
    for token in added:
        found = extended.token_to_id(token.content)
        if found != token.id:
            raise ValueError(f"token {token.content[:60]!r} gets id {found}, not {token.id}")
        if (other := base.id_to_token(token.id)) not in (None, token.content):
            raise ValueError(
                f"id {token.id} of token {token.content[:60]!r} is token {str(other)[:60]!r} of the base model"
            )


def _gap(token_id: int) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(_GAP.format(token_id), special=True, normalized=False)


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        special=token.special,
        normalized=token.normalized,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
    )
