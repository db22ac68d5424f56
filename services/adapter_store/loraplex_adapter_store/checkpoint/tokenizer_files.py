"""Tokenizer files beside an adapter: accepted if they do what the base model's files do, else refused by name.

An adapter may add tokens (see `added_tokens`): its files are compared with what the base model's would be with those. Any
other difference is refused. Trainers write copies of the base model's files in their own libraries' spelling; those are
accepted. Padding, truncation, training settings and the writer's version make no difference here. What the files say of chat
template, stop tokens and response schema is the adapter's own: see `adapter_texts`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from loraplex_common.tokenizer_config import SPECIAL_TOKENS

from loraplex_adapter_store.checkpoint.adapter_texts import BroughtTexts, brought_texts
from loraplex_adapter_store.checkpoint.added_tokens import added_tokens
from loraplex_adapter_store.checkpoint.base_tokenizer import (
    BaseTokenizer,
    ExtendedBase,
    base_tokenizer,
    prefix_after_rule,
    token_content,
)
from loraplex_adapter_store.checkpoint.tokenizer_json import (
    TokenizerFacts,
    around,
    moved_token,
    read_tokenizer,
    tokenizer_difference,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from loraplex_common.added_tokens import AddedToken

TOKENIZER: Final = "tokenizer.json"
_REDUNDANT: Final = frozenset({"tokenizer.model", "vocab.json", "merges.txt"})  # redundant beside a tokenizer.json
_JSON_FILES: Final = (
    *("added_tokens.json", "chat_template.json", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"),
)
_SETTINGS: Final = frozenset({"chat_template.json", "special_tokens_map.json", "tokenizer_config.json"})


def check_tokenizer_files(files: Mapping[str, bytes], base_directory: Path) -> BroughtTexts:
    """Compare the tokenizer files of an adapter with its base model's, and return what they bring of their own.

    It takes whatever time and memory the files require: for untrusted files see `text_check`.

    Args:
        files: Name -> content of the `TEXT_FILES` that the adapter brings.
        base_directory: The base model's files.

    Raises:
        AdapterIncompatibleError: If a file differs in what matters; the message names the file and the difference.
        AdapterCorruptUploadError: If a file cannot be read.
    """
    base: BaseTokenizer = base_tokenizer(base_directory)
    others = {name: data for name, data in files.items() if data != base.bytes_of(name)}
    if "tokenizer.json" in files:
        others = {name: data for name, data in others.items() if name not in _REDUNDANT}
    objects: dict[str, dict[str, Any]] = {
        name: _object(name, files[name])
        for name in _JSON_FILES
        if name in others or (name in _SETTINGS and name in files)
    }
    theirs = read_tokenizer(others[TOKENIZER]) if TOKENIZER in others else None
    tokens = added_tokens(theirs, objects, base)
    if tokens:
        base = _extended(base, tokens, moved_token(others[TOKENIZER], theirs) if theirs is not None else None)
    for name, difference in _differences(others, theirs, objects, base):
        raise _refused(name, difference)
    return brought_texts(files, objects, base, added=tokens)


def _extended(base: BaseTokenizer, tokens: Sequence[AddedToken], moved: str | None) -> BaseTokenizer:
    if moved is not None:
        raise _refused(TOKENIZER, moved)
    try:
        return ExtendedBase(base, tokens)
    except ValueError as error:
        raise _refused(TOKENIZER, str(error)) from error


def _refused(name: str, difference: str) -> AdapterIncompatibleError:
    return AdapterIncompatibleError(
        f"{name} beside the adapter: {difference}. Adapters are served with the base model's tokenizer and the tokens that they "
        "add to it; remove the file if the adapter does not depend on it"
    )


def _differences(
    others: Mapping[str, bytes],
    theirs: TokenizerFacts | None,
    objects: Mapping[str, dict[str, Any]],
    base: BaseTokenizer,
) -> Iterator[tuple[str, str]]:
    """Yield (file, difference).

    Args:
        others: The files whose bytes differ from the base model's.
        theirs: The tokenizer.json among them, read.
        objects: The files that are JSON objects.
        base: The base model's files, with the tokens that the adapter adds.
    """
    fields = {name: objects[name] for name in _JSON_FILES if name in others}
    surroundings: tuple[list[int], list[int]] | None = None
    if theirs is not None:
        if difference := tokenizer_difference(theirs, base.facts):
            yield TOKENIZER, difference
        surroundings = around(theirs)
    if "tokenizer.model" in others:
        yield (
            "tokenizer.model",
            "the base model has no such file, or another one, and there is no tokenizer.json to compare",
        )
    if "vocab.json" in fields and (found := _vocab_difference(fields["vocab.json"], base)):
        yield "vocab.json", found
    if "merges.txt" in others and (found := _merges_difference(others["merges.txt"], base)):
        yield "merges.txt", found
    if found := _added_difference(fields.get("added_tokens.json", {}), base):
        yield "added_tokens.json", found
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in fields and (found := _config_difference(fields[name], base)):
            yield name, found
    if found := _space_difference(fields.get("tokenizer_config.json", {}), base):
        yield "tokenizer_config.json", found
    yield from _surroundings_difference(surroundings, fields.get("tokenizer_config.json", {}), base)


def _object(name: str, data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterCorruptUploadError(f"{name}: no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterCorruptUploadError(f"{name}: no JSON object")
    return fields


def _vocab_difference(vocab: dict[str, Any], base: BaseTokenizer) -> str | None:
    """Compare a vocab.json; it may contain added tokens or not."""
    if found := _added_difference(vocab, base):
        return found
    missing = next((token for token in base.vocabulary if token not in vocab and token not in base.facts.added), None)
    return None if missing is None else f"the base model's token {missing[:60]!r} is missing"


def _merges_difference(data: bytes, base: BaseTokenizer) -> str | None:
    # Only line ends separate merges: tokens may contain what `splitlines` splits at besides, such as U+2028.
    lines = [line.removesuffix("\r") for line in data.decode(errors="replace").split("\n")]
    merges = [line for line in lines[1 if lines and lines[0].startswith("#version") else 0 :] if line]
    theirs = json.loads(base.facts.tokenizer.to_str())["model"].get("merges") or []
    if [line.split(" ") for line in merges] != theirs:
        return "its merges differ from the base model's"
    return None


def _added_difference(tokens: Mapping[str, Any], base: BaseTokenizer) -> str | None:
    for token, token_id in tokens.items():
        if base.vocabulary.get(token) != token_id:
            return f"token {token[:60]!r} (id {token_id}) is not the base model's"
    return None


def _config_difference(fields: dict[str, Any], base: BaseTokenizer) -> str | None:
    """Compare the tokens of a tokenizer_config.json or special_tokens_map.json."""
    decoder = fields.get("added_tokens_decoder")
    listed = decoder.items() if isinstance(decoder, dict) else ()
    added = {
        str(token_content(token)): int(token_id)
        for token_id, token in listed
        if token_id.isdecimal() and len(token_id) < 10
    }
    if found := _added_difference(added, base):
        return found
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = fields.get(name)
        for token in tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ():
            if (content := token_content(token)) is not None and content not in base.vocabulary:
                return f"{name} has {content[:60]!r}, which is no token of the base model"
    for name in SPECIAL_TOKENS:
        content, theirs = token_content(fields.get(name)), base.special(name)
        if content is None or content == theirs:
            continue
        # Without an id before every text, no text begins with it; `add_bos_token` is compared with the surroundings.
        if name == "bos_token" and theirs is not None and base.prefix:
            return f"its bos_token is {content!r}, the base model's is {theirs!r}"
        # The other tokens take no part in generation, unless a template writes them, which is checked there.
        if name == "eos_token" and content not in base.vocabulary:
            return f"its eos_token is {content!r}, which is no token of the base model"
    return None


def _space_difference(config: Mapping[str, Any], base: BaseTokenizer) -> str | None:
    """Compare ``add_prefix_space``, which transformers applies to a pre-tokeniser of one part; it may be spelled out."""
    said, parts = config.get("add_prefix_space"), base.facts.stages["pre_tokenizer"]
    if not isinstance(said, bool) or len(parts) != 1 or said == base.config.get("add_prefix_space"):
        return None
    part = parts[0]
    adds = part.get("add_prefix_space") if part.get("type") == "ByteLevel" else None
    if part.get("type") == "Metaspace":
        adds = part.get("prepend_scheme") != "never"
    if adds in (None, said):
        return None
    return (
        f"add_prefix_space is {str(said).lower()}, the base model's tokenizer {'puts' if adds else 'does not put'} one"
    )


def _surroundings_difference(
    surroundings: tuple[list[int], list[int]] | None, config: Mapping[str, Any], base: BaseTokenizer
) -> Iterator[tuple[str, str]]:
    """Compare the ids before and after every text, if the files say anything about them."""
    add_bos = config.get("add_bos_token")
    if surroundings is None and not isinstance(add_bos, bool):
        return
    before, after = around(base.facts) if surroundings is None else surroundings
    bos = token_content(config.get("bos_token")) or base.special("bos_token")
    before = prefix_after_rule(before, add_bos, base.vocabulary.get(bos) if bos is not None else None)
    name = "tokenizer_config.json" if isinstance(add_bos, bool) else "tokenizer.json"
    if before != base.prefix:
        yield name, f"it puts ids {before[:8]} before every text, the base model's tokenizer {base.prefix}"
    eos = base.special("eos_token")
    # Trainers add EOS to each text, so that the model learns its end; a prompt must not end with it.
    if after and after not in (around(base.facts)[1], [base.vocabulary.get(eos or "")]):
        yield name, f"it puts ids {after[:8]} after every text, the base model's tokenizer {around(base.facts)[1]}"
