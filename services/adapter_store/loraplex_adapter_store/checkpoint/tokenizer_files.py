"""Tokenizer files beside an adapter: accepted if they say what the base model's say, else refused by name.

loraplex tokenises with the base model's tokenizer and template. An adapter trained with added tokens or another template
would be served wrongly, so it is not served. Trainers often write unchanged copies; those are fine. What only concerns
padding, truncation or the writer's version makes no difference here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
MAX_TOKENIZER_BYTES: Final = 64 * 1024 * 1024
_REDUNDANT: Final = frozenset({"tokenizer.model", "vocab.json", "merges.txt"})  # beside an equal tokenizer.json
_SPECIALS: Final = ("bos_token", "eos_token", "unk_token")  # the others take no part in generation


def check_tokenizer_files(files: dict[str, bytes], base_directory: Path) -> None:
    """Compare the tokenizer files of an adapter with its base model's.

    Args:
        files: Name -> content of those `TOKENIZER_FILES` that the adapter brings.
        base_directory: The base model's files.

    Raises:
        AdapterIncompatibleError: If one differs in what matters; the message names the file and the difference.
        AdapterCorruptUploadError: If one cannot be read.
    """
    base = _BaseTokenizer(base_directory)
    for name, data in files.items():
        difference = _difference(name, data, base, has_tokenizer="tokenizer.json" in files)
        if difference:
            raise AdapterIncompatibleError(
                f"{name} beside the adapter: {difference}. Adapters are served with the base model's tokenizer and chat "
                "template; remove the file if the adapter does not depend on it"
            )


class _BaseTokenizer:
    """The base model's tokenizer files, read when asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def bytes_of(self, name: str) -> bytes | None:
        path = self._directory / name
        return path.read_bytes() if path.is_file() else None

    def json_of(self, name: str) -> dict[str, Any]:
        data = self.bytes_of(name)
        return json.loads(data) if data is not None else {}

    def vocabulary(self) -> dict[str, int]:
        tokenizer = self.json_of("tokenizer.json")
        vocab = tokenizer.get("model", {}).get("vocab", {})
        ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
        return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}

    def templates(self) -> set[str]:
        texts = [self.json_of("tokenizer_config.json").get("chat_template")]
        texts.append(self.json_of("chat_template.json").get("chat_template"))
        jinja = self.bytes_of("chat_template.jinja")
        texts.append(jinja.decode() if jinja is not None else None)
        return {text.strip() for text in texts if isinstance(text, str)}

    def special(self, name: str) -> str | None:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (token := self.json_of(file).get(name)) is not None:
                return _content(token)
        return None


def _difference(name: str, data: bytes, base: _BaseTokenizer, *, has_tokenizer: bool) -> str | None:
    if data == base.bytes_of(name) or (name in _REDUNDANT and has_tokenizer):
        return None
    if name in _REDUNDANT:
        return "the base model has no such file, or another one"
    if name == "chat_template.jinja":
        return _template_difference(data.decode(errors="replace"), base)
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterCorruptUploadError(f"{name}: no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterCorruptUploadError(f"{name}: no JSON object")
    if name == "tokenizer.json":
        return _tokenizer_difference(fields, base)
    if name == "added_tokens.json":
        return _added_difference(fields, base)
    return _config_difference(fields, base)


def _tokenizer_difference(fields: dict[str, Any], base: _BaseTokenizer) -> str | None:
    theirs = base.json_of("tokenizer.json")
    for key in sorted((set(fields) | set(theirs)) - {"truncation", "padding", "version"}):
        if fields.get(key) != theirs.get(key):
            return f"its {key!r} differs from the base model's"
    return None


def _added_difference(tokens: dict[str, Any], base: _BaseTokenizer) -> str | None:
    vocabulary = base.vocabulary()
    for token, token_id in tokens.items():
        if vocabulary.get(token) != token_id:
            return f"token {token[:60]!r} (id {token_id}) is not the base model's"
    return None


def _template_difference(text: Any, base: _BaseTokenizer) -> str | None:
    if not isinstance(text, str) or text.strip() not in base.templates():
        return "its chat template differs from the base model's"
    return None


def _config_difference(fields: dict[str, Any], base: _BaseTokenizer) -> str | None:
    """Compare tokenizer_config.json, special_tokens_map.json or chat_template.json."""
    if fields.get("chat_template") and (found := _template_difference(fields["chat_template"], base)):
        return found
    decoder = fields.get("added_tokens_decoder") or {}
    added = {_content(token): int(token_id) for token_id, token in decoder.items() if str(token_id).isdigit()}
    if found := _added_difference(added, base):
        return found
    for name in _SPECIALS:
        theirs = base.special(name)
        if fields.get(name) is not None and _content(fields[name]) != theirs:
            return f"its {name} is {_content(fields[name])!r}, the base model's is {theirs!r}"
    return None


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)
