"""What a revision brings besides weights: text parts, which stores keep and gateways use for its requests.

A part exists only where it differs from the base model's. The parts are in the revision's digest; their own digest lets
gateways keep one copy for all revisions that bring the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loraplex_common.added_tokens import AddedToken

MAX_TEMPLATE_BYTES: Final = 64 * 1024
"""Bytes in UTF-8 of a chat template that an adapter brings; the longest in use have half of it."""
MAX_SCHEMA_BYTES: Final = 64 * 1024
"""Bytes of a response schema as compact JSON."""
MAX_STOP_TOKENS: Final = 16
"""Stop tokens that an adapter adds to its base model's."""
MAX_INVOCATION_TOKENS: Final = 64
"""Tokens of the sequence that an activated adapter applies from."""
GENERATION_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "temperature": (0.0, 100.0),
    "top_k": (-1, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 10.0),
}
"""The settings of a generation_config.json that gateways fill in, with the values that a request may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPartsInfo:
    """What is said of text parts where they are not needed themselves.

    Attributes:
        digest: sha256 over the parts, 64 hex digits.
        kinds: Names of the parts, see `TextParts.kinds`.
    """

    digest: str
    kinds: tuple[str, ...]

    def to_json(self) -> str:
        """Encode for Valkey."""
        return json.dumps({"digest": self.digest, "kinds": self.kinds})

    @classmethod
    def from_json(cls, data: str | bytes) -> TextPartsInfo:
        """Decode what `to_json` wrote."""
        fields = json.loads(data)
        return cls(digest=fields["digest"], kinds=tuple(fields["kinds"]))


@dataclass(frozen=True, kw_only=True)
class TextParts:
    """The text parts of a revision; empty where the base model's apply.

    Attributes:
        chat_template: Jinja source.
        special_tokens: The roles that the template reads and the adapter fills otherwise than its base, e.g.
            ``{"eos_token": "<|im_end|>"}``; none without a template.
        generation: Sampling defaults, by the names of `GENERATION_RANGES`; ``top_k`` is an int, the others are floats.
        stop_token_ids: Ids that end an output besides the base model's end-of-text ids, ascending.
        response_schema: ``response_template``, else ``response_schema``, of a tokenizer_config.json as compact JSON: how an
            answer is taken apart.
        invocation_token_ids: The sequence that an activated LoRA (aLoRA) applies from: from its last occurrence in the
            prompt on. Empty: the adapter applies to the whole sequence.
        added_tokens: Tokens that the adapter's tokenizer has and the base model's has not, by ascending id.
    """

    chat_template: str = ""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    response_schema: str = ""
    invocation_token_ids: tuple[int, ...] = ()
    added_tokens: tuple[AddedToken, ...] = ()

    def to_fields(self) -> dict[str, Any]:
        """Return the parts that exist, for JSON; empty if there are none."""
        fields = {
            "chat_template": self.chat_template,
            "special_tokens": dict(self.special_tokens),
            "generation": dict(self.generation),
            "stop_token_ids": list(self.stop_token_ids),
            "response_schema": self.response_schema,
            "invocation_token_ids": list(self.invocation_token_ids),
            "added_tokens": [token.to_fields() for token in self.added_tokens],
        }
        return {name: value for name, value in fields.items() if value}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> TextParts:
        """Read what `to_fields` returned.

        Raises:
            TypeError: If there is a part that this version does not know.
        """
        ids = {name: tuple(fields.get(name, ())) for name in ("stop_token_ids", "invocation_token_ids")}
        added = tuple(AddedToken.from_fields(token) for token in fields.get("added_tokens", ()))
        return cls(**{**fields, **ids, "added_tokens": added})

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the parts that exist, for people: ``chat_template``, ``generation_defaults`` and so on."""
        parts = {
            "chat_template": self.chat_template,
            "generation_defaults": self.generation,
            "stop_tokens": self.stop_token_ids,
            "response_schema": self.response_schema,
            "invocation_tokens": self.invocation_token_ids,
            "added_tokens": self.added_tokens,
        }
        return tuple(name for name, part in parts.items() if part)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over the parts, 64 hex digits."""
        return hashlib.sha256(self._encoded).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size as JSON."""
        return len(self._encoded)

    @functools.cached_property
    def added_digest(self) -> str:
        """sha256 over the added tokens, 64 hex digits: adapters that add the same share a tokenizer."""
        fields = [token.to_fields() for token in self.added_tokens]
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def info(self) -> TextPartsInfo | None:
        """What is said of the parts; None if there are none."""
        return TextPartsInfo(digest=self.digest, kinds=self.kinds) if self.to_fields() else None

    @property
    def _encoded(self) -> bytes:
        return json.dumps(self.to_fields(), sort_keys=True, separators=(",", ":")).encode()
