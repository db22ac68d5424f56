"""What generation_config.json says about sampling, and which tokens end an output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraplex_common.end_of_text import read_eos_token_ids
from loraplex_common.tokenizer_config import read_json_object

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.text_parts import TextParts

    from loraplex_gateway.types import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """A model's own sampling defaults; `None` where the model says nothing.

    Attributes:
        eos_token_ids: Ids that end an output.
        added_stop_ids: Those among them that an adapter adds; the engine stops at the others by itself.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: frozenset[int] = frozenset()
    added_stop_ids: frozenset[int] = frozenset()

    def fill(self, sampling: Sampling) -> Sampling:
        """Return the sampling knobs with every unset one that the model has an opinion on filled in."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        unset = {name: getattr(self, name) for name in names if getattr(sampling, name) is None}
        return replace(sampling, **{name: value for name, value in unset.items() if value is not None})

    def with_parts(self, parts: TextParts) -> GenerationDefaults:
        """Return the defaults with those that an adapter brings in front of them."""
        added = frozenset(parts.stop_token_ids) - self.eos_token_ids
        settings: dict[str, Any] = dict(parts.generation)
        return replace(self, **settings, eos_token_ids=self.eos_token_ids | added, added_stop_ids=added)


def load_generation_defaults(directory: Path, vocab_size: int) -> GenerationDefaults:
    """Read what a model directory says about generation.

    Args:
        directory: Model directory.
        vocab_size: Token ids are below it.

    Raises:
        BaseModelError: If a file cannot be read.
    """
    config = read_json_object(directory / "generation_config.json")
    return GenerationDefaults(
        temperature=config.get("temperature"),
        top_k=config.get("top_k"),
        top_p=config.get("top_p"),
        min_p=config.get("min_p"),
        repetition_penalty=config.get("repetition_penalty"),
        eos_token_ids=frozenset(read_eos_token_ids(directory, vocab_size)),
    )
