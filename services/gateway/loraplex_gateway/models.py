"""The base models a gateway speaks for: names, tokenizer, defaults."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.errors import InvalidParameterError, ModelNotFoundError

from loraplex_gateway.generation_defaults import GenerationDefaults, load_generation_defaults
from loraplex_gateway.tokenization import PromptTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One base model as the gateway needs it."""

    info: BaseModelInfo
    tokenizer: PromptTokenizer
    defaults: GenerationDefaults

    @property
    def name(self) -> str:
        """Name clients use."""
        return self.info.name

    @property
    def fingerprint(self) -> str:
        """Fingerprint that adapters and engines of this model carry."""
        return self.info.fingerprint


def load_served_model(
    directory: Path, executor: ThreadPoolExecutor, *, name: str | None = None, aliases: tuple[str, ...] = ()
) -> ServedModel:
    """Read a model directory.

    Raises:
        BaseModelError: If it is no base model we can serve.
        ChatTemplateError: If its chat template is unreadable.
    """
    info = load_base_model(directory, name=name, aliases=aliases)
    return ServedModel(
        info=info,
        tokenizer=PromptTokenizer.from_directory(directory, executor),
        defaults=load_generation_defaults(directory, info.vocab_size),
    )


class ModelCatalog:
    """All base models of this gateway, by name, alias and fingerprint."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = tuple(models)
        if not self._models:
            raise ValueError("a gateway needs at least one --model directory")
        self._by_fingerprint = {model.fingerprint: model for model in self._models}
        self._by_name = {alias: model for model in self._models for alias in model.info.aliases}
        self._by_name.update({model.name: model for model in self._models})

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models in the order of their flags."""
        return self._models

    def find(self, name: str) -> ServedModel | None:
        """Return the model with this name or alias."""
        return self._by_name.get(name)

    def by_fingerprint(self, fingerprint: str) -> ServedModel | None:
        """Return the model with this fingerprint."""
        return self._by_fingerprint.get(fingerprint)

    def select(self, name: str) -> ServedModel:
        """Return the named model, or the only one for an empty name.

        Raises:
            InvalidParameterError: If the name is empty and there are several.
            ModelNotFoundError: If there is none of this name.
        """
        if not name:
            if len(self._models) == 1:
                return self._models[0]
            names = ", ".join(model.name for model in self._models)
            raise InvalidParameterError(f"model is empty, but several are served: {names}", field="model")
        model = self._by_name.get(name)
        if model is None:
            close = difflib.get_close_matches(name, list(self._by_name), n=3) or sorted(self._by_name)[:3]
            raise ModelNotFoundError(
                f"no base model {name!r} is served here; did you mean {', '.join(close)}? "
                "(an adapter goes into the field adapter)",
                metadata={"model": name},
            )
        return model
