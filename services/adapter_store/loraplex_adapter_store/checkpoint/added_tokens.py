"""Which tokens the files beside an adapter add to its base model's tokenizer.

The files are read as transformers reads them: tokenizer.json has its own added tokens; those that tokenizer_config.json
(``added_tokens_decoder``) or, without that, added_tokens.json has besides come behind them. A folder without tokenizer.json
adds its tokens to the base model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_common.added_tokens import FLAGS, MAX_ADDED_TOKEN_BYTES, MAX_ADDED_TOKENS, AddedToken
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.projections import EMBED_OP
from loraplex_common.token_rows import ROWS
from loraplex_common.tokenizer_config import SPECIAL_TOKENS

from loraplex_adapter_store.checkpoint.base_tokenizer import token_content

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from loraplex_common.base_model import BaseModelInfo

    from loraplex_adapter_store.checkpoint.base_tokenizer import BaseTokenizer
    from loraplex_adapter_store.checkpoint.parts import Module
    from loraplex_adapter_store.checkpoint.tokenizer_json import TokenizerFacts

Listed = dict[int, AddedToken]
_TOKENIZER: Final = "tokenizer.json"
_CONFIG: Final = "tokenizer_config.json"
_OLD_FILE: Final = "added_tokens.json"
_MAX_ID: Final = 2**31 - 1


def added_tokens(
    theirs: TokenizerFacts | None, objects: Mapping[str, dict[str, Any]], base: BaseTokenizer
) -> tuple[AddedToken, ...]:
    """Return the tokens that the base model lacks, by ascending id.

    Args:
        theirs: The adapter's tokenizer.json; None if there is none, or it is the base model's.
        objects: The JSON objects among the files.
        base: The base model's files.

    Raises:
        AdapterIncompatibleError: If files contradict each other, ids do not continue the base model's, or there are too many
            tokens or too long ones.
    """
    found: Listed = {}
    for file, listed in _sources(theirs, objects, base):
        for token_id, token in listed.items():
            _add(found, token_id, token, file)
    tokens = tuple(token for _, token in sorted(found.items()))
    _check_bounds(tokens)
    _check_ids(tokens, base)
    return tokens


def check_rows(tokens: Sequence[AddedToken], modules: Iterable[Module], base: BaseModelInfo) -> None:
    """Refuse tokens beyond the base model's rows that the adapter has no row for: no engine could read or draw them.

    Args:
        tokens: By ascending id.
        modules: What the adapter adapts.
        base: The base model.

    Raises:
        AdapterIncompatibleError: With the token and the remedy.
    """
    beyond = {token.id: token for token in tokens if token.id >= base.vocab_size}
    if not beyond:
        return
    rows = {module.projection: part.tensors[0] for module in modules if (part := module.of_kind(ROWS)) is not None}
    needed = [each for each in base.outside if each.op == EMBED_OP or not base.tied_embeddings]
    for name in [each.name for each in needed] or ["embed_tokens"]:
        known = {int(each) for each in rows[name].values()} if name in rows else set()
        if (missing := min(beyond.keys() - known, default=None)) is not None:
            token = beyond[missing]
            raise AdapterIncompatibleError(
                f"token {token.content[:60]!r} (id {missing}) beside the adapter is beyond the base model's {base.vocab_size} rows, "
                f"and the adapter has no row of {name} for it: save it with its resized embeddings (PEFT: save_pretrained with "
                "save_embedding_layers=True, or trainable_token_indices), or remove the token from its tokenizer"
            )


def _sources(
    theirs: TokenizerFacts | None, objects: Mapping[str, dict[str, Any]], base: BaseTokenizer
) -> Iterator[tuple[str, Listed]]:
    if theirs is not None:
        own = {
            token_id: token for token_id, token in theirs.added_tokens.items() if token.content not in base.facts.added
        }
        yield _TOKENIZER, own
    config = objects.get(_CONFIG, {})
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        yield _CONFIG, _new(_of_decoder(decoder), base)
    else:
        yield _OLD_FILE, _new(_of_old_file(objects.get(_OLD_FILE, {}), objects), base)


def _new(tokens: Iterable[AddedToken], base: BaseTokenizer) -> Listed:
    return {token.id: token for token in tokens if token.content not in base.vocabulary}


def _of_decoder(decoder: Mapping[str, Any]) -> Iterator[AddedToken]:
    for key, fields in decoder.items():
        content = token_content(fields)
        if content is None or not key.isdecimal() or len(key) >= 10:
            continue
        flags = fields if isinstance(fields, dict) else {}
        # As the library's AddedToken has it: what is not special is looked for in the normalised text.
        default = {"normalized": not flags.get("special", False)}
        yield AddedToken(
            id=int(key), content=content, **{name: bool(flags.get(name, default.get(name, False))) for name in FLAGS}
        )


def _of_old_file(tokens: Mapping[str, Any], objects: Mapping[str, dict[str, Any]]) -> Iterator[AddedToken]:
    """Yield the tokens of an added_tokens.json, which has ids alone: special are those that a role or a list names."""
    special = {content for fields in objects.values() for content in _named(fields)}
    for content, token_id in tokens.items():
        if type(token_id) is int and 0 <= token_id <= _MAX_ID:
            is_special = content in special
            yield AddedToken(id=token_id, content=content, special=is_special, normalized=not is_special)


def _named(fields: Mapping[str, Any]) -> Iterator[str]:
    lists = [fields.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    for token in [fields.get(role) for role in SPECIAL_TOKENS] + [
        token for tokens in lists if isinstance(tokens, list) for token in tokens
    ]:
        if (content := token_content(token)) is not None:
            yield content


def _add(found: Listed, token_id: int, token: AddedToken, file: str) -> None:
    if (other := found.get(token_id)) is not None and other != token:
        raise _refused(file, f"id {token_id} is token {token.content[:60]!r}, in another file {other.content[:60]!r}")
    if any(other.content == token.content and other.id != token_id for other in found.values()):
        raise _refused(file, f"token {token.content[:60]!r} has id {token_id}, in another file another one")
    found[token_id] = token


def _check_bounds(tokens: tuple[AddedToken, ...]) -> None:
    if len(tokens) > MAX_ADDED_TOKENS:
        raise _refused(
            _TOKENIZER, f"it adds {len(tokens)} tokens to the base model's; at most {MAX_ADDED_TOKENS} may be added"
        )
    for token in tokens:
        if not 1 <= len(token.content.encode("utf-8", errors="surrogatepass")) <= MAX_ADDED_TOKEN_BYTES:
            raise _refused(
                _TOKENIZER,
                f"token {token.content[:60]!r} (id {token.id}) is added; an added token has 1 to {MAX_ADDED_TOKEN_BYTES} bytes",
            )


def _check_ids(tokens: tuple[AddedToken, ...], base: BaseTokenizer) -> None:
    """Refuse ids that are taken, or that leave out one that has no row in the base model's weights either."""
    next_id = base.vocab_size
    for token in tokens:
        taken = base.token_of(token.id)
        if taken is not None and taken != token.content:
            raise _refused(
                _TOKENIZER,
                f"token {token.content[:60]!r} (id {token.id}) is not the base model's, whose id {token.id} is {taken[:60]!r}",
            )
        if token.id < base.vocab_size:
            continue
        if token.id != next_id:
            raise _refused(
                _TOKENIZER,
                f"token {token.content[:60]!r} (id {token.id}) is added, but no token has id {next_id}; ids must go on behind "
                f"the base model's {base.vocab_size} rows",
            )
        next_id += 1


def _refused(file: str, difference: str) -> AdapterIncompatibleError:
    return AdapterIncompatibleError(
        f"{file} beside the adapter: {difference}. Save the tokenizer again as the adapter was trained with it, or remove the "
        "file if the adapter does not depend on it"
    )
