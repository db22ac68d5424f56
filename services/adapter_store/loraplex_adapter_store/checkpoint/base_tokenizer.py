"""The base model's tokenizer and template for comparisons, read once and kept while their files do not change."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from loraplex_common.adapter_folder import GENERATION_FILE, TEXT_FILES
from loraplex_common.end_of_text import read_eos_token_ids
from loraplex_common.tokenizer_config import read_special_tokens, read_tokenizer_config

from loraplex_adapter_store.checkpoint.chat_templates import Template, effective_template, read_template
from loraplex_adapter_store.checkpoint.tokenizer_json import TokenizerFacts, around, read_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loraplex_common.added_tokens import AddedToken


def token_content(token: Any) -> str | None:
    """Return the text of a token that a configuration writes as a string or an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def prefix_after_rule(ids: list[int], add_bos: Any, bos_id: int | None) -> list[int]:
    """Return the ids put before a text, with ``add_bos_token`` of a tokenizer_config.json applied.

    Args:
        ids: Ids that the tokenizer itself puts there.
        add_bos: The setting; any value except true and false leaves ``ids`` as they are.
        bos_id: Id of the BOS token, if there is one.
    """
    if not isinstance(add_bos, bool) or bos_id is None:
        return ids
    if add_bos:
        return ids if ids[:1] == [bos_id] else [bos_id, *ids]
    return ids[1:] if ids[:1] == [bos_id] else ids


class BaseTokenizer:
    """A base model's tokenizer files; see `base_tokenizer`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def bytes_of(self, name: str) -> bytes | None:
        """Return a file's content, None if there is no such file."""
        path = self._directory / name
        return path.read_bytes() if path.is_file() else None

    @functools.cached_property
    def facts(self) -> TokenizerFacts:
        """Content of tokenizer.json, parsed."""
        path = self._directory / "tokenizer.json"
        return read_tokenizer(path.read_bytes(), file=str(path))

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return self.facts.vocabulary()

    @functools.cached_property
    def vocab_size(self) -> int:
        """Rows of the base model's embedding; there may be more of them than tokens."""
        size = self._json_of("config.json").get("vocab_size")
        return size if type(size) is int else max(self.vocabulary.values()) + 1

    def token_of(self, token_id: int) -> str | None:
        """Return the token that has an id; None if none has."""
        return self._tokens.get(token_id)

    @functools.cached_property
    def _tokens(self) -> dict[int, str]:
        return {token_id: token for token, token_id in self.vocabulary.items()}

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Content of tokenizer_config.json; empty if there is none."""
        return self._json_of("tokenizer_config.json")

    @functools.cached_property
    def prefix(self) -> list[int]:
        """Ids that are put before every text."""
        bos = self.special("bos_token")
        bos_id = self.vocabulary.get(bos) if bos is not None else None
        return prefix_after_rule(around(self.facts)[0], self.config.get("add_bos_token"), bos_id)

    @functools.cached_property
    def template(self) -> Template | None:
        """The chat template that is served; None if there is none."""
        found = self._found_template
        return None if found is None else read_template(found[0], file=str(self._directory / found[1]))

    @property
    def template_source(self) -> str | None:
        """Its Jinja source; None if there is none."""
        return None if self._found_template is None else self._found_template[0]

    @functools.cached_property
    def special_tokens(self) -> dict[str, str]:
        """Role -> special token, as the chat template sees them."""
        return read_special_tokens(read_tokenizer_config(self._directory))

    @functools.cached_property
    def generation(self) -> dict[str, Any]:
        """Content of generation_config.json; empty if there is none."""
        return self._json_of(GENERATION_FILE)

    @functools.cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end an output of the base model."""
        return frozenset(read_eos_token_ids(self._directory, len(self.vocabulary)))

    @functools.cached_property
    def _found_template(self) -> tuple[str, str] | None:
        configs = {name: self._json_of(name) for name in ("tokenizer_config.json", "chat_template.json")}
        return effective_template(self.bytes_of("chat_template.jinja"), configs)

    def special(self, name: str) -> str | None:
        """Return a special token by its role."""
        for fields in (self.config, self._json_of("special_tokens_map.json")):
            if (content := token_content(fields.get(name))) is not None:
                return content
        return None

    def _json_of(self, name: str) -> dict[str, Any]:
        data = self.bytes_of(name)
        fields = json.loads(data) if data is not None else {}
        return fields if isinstance(fields, dict) else {}


class ExtendedBase(BaseTokenizer):
    """A base model's tokenizer files as they would be with an adapter's tokens added.

    Args:
        base: The files as they are.
        tokens: By ascending id.

    Raises:
        ValueError: If a token's id is another's.
    """

    def __init__(self, base: BaseTokenizer, tokens: Sequence[AddedToken]) -> None:
        super().__init__(base._directory)
        self.facts = base.facts.extended(tokens)
        self.eos_token_ids = base.eos_token_ids


def files_state(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Return a value that changes whenever a base model's tokenizer files do."""
    stats = ((name, (directory / name)) for name in TEXT_FILES)
    return tuple((name, path.stat().st_mtime_ns, path.stat().st_size) for name, path in stats if path.is_file())


def base_tokenizer(directory: Path) -> BaseTokenizer:
    """Return a base model's tokenizer, read anew only if a file has changed."""
    return _base_tokenizer(directory, files_state(directory))


@functools.lru_cache(maxsize=8)
def _base_tokenizer(directory: Path, state: tuple[tuple[str, int, int], ...]) -> BaseTokenizer:
    return BaseTokenizer(directory)
