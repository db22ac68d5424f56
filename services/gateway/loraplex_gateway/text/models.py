"""The base models a gateway speaks for: names, tokenizer, defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraplex_common.base_model import BaseModelInfo, check_distinct_names, load_base_model
from loraplex_common.errors import InvalidParameterError, ModelNotFoundError
from loraplex_common.text_parts import TextParts

from loraplex_gateway.adapters.close_names import MAX_NAME_CHARS, NameOrder
from loraplex_gateway.text.generation_defaults import GenerationDefaults, load_generation_defaults
from loraplex_gateway.text.token_ids import TokenIds
from loraplex_gateway.text.tokenization import PromptTokenizer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from loraplex_common.auth import Principal

    from loraplex_gateway.adapters.names import NameTable
    from loraplex_gateway.text.fair_workers import FairWorkers


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One base model as the gateway needs it, by itself or as an adapter speaks (`voices`).

    Attributes:
        created: Unix time at which its config.json was written: the same for all processes that read it.
        text_parts: What the adapter brings; empty for the model by itself.
    """

    info: BaseModelInfo
    tokenizer: PromptTokenizer
    defaults: GenerationDefaults
    created: int = 0
    text_parts: TextParts = field(default_factory=TextParts)

    @property
    def name(self) -> str:
        """Name clients use."""
        return self.info.name

    @property
    def fingerprint(self) -> str:
        """Fingerprint that adapters and engines of this model carry."""
        return self.info.fingerprint

    @property
    def token_ids(self) -> TokenIds:
        """The ids that requests may name."""
        return TokenIds(self.info.vocab_size, self.tokenizer.added_ids)


def load_served_model(
    directory: Path,
    workers: FairWorkers,
    *,
    name: str | None = None,
    aliases: tuple[str, ...] = (),
    text_only: bool = False,
) -> ServedModel:
    """Read a model directory.

    Raises:
        BaseModelError: If it is no base model we can serve.
        ChatTemplateError: If its chat template is unreadable.
    """
    info = load_base_model(directory, name=name, aliases=aliases, text_only=text_only)
    return ServedModel(
        info=info,
        tokenizer=PromptTokenizer.from_directory(directory, workers),
        defaults=load_generation_defaults(directory, info.vocab_size),
        created=int((directory / "config.json").stat().st_mtime),
    )


def load_served_models(
    directories: Sequence[Path],
    workers: FairWorkers,
    *,
    name: str | None,
    aliases: tuple[str, ...],
    text_only: bool = False,
) -> list[ServedModel]:
    """Read model directories, like `load_served_model`; the name and the aliases are the first one's."""
    first, *others = directories
    models = [load_served_model(first, workers, name=name, aliases=aliases, text_only=text_only)]
    return models + [load_served_model(directory, workers, text_only=text_only) for directory in others]


class ModelCatalog:
    """All base models of this gateway, by name, alias and fingerprint.

    Args:
        models: In the order of their flags. Two of one fingerprint are one model under two names, each with its own
            tokenizer files; a look-up by fingerprint finds the first.
        adapters: Names that are adapters; none without an adapter store.

    Raises:
        BaseModelError: If a name belongs to two models.
    """

    def __init__(self, models: Iterable[ServedModel], adapters: NameTable | None = None) -> None:
        self._models = tuple(models)
        if not self._models:
            raise ValueError("a gateway needs at least one --model directory")
        check_distinct_names(model.info for model in self._models)
        self._adapters = adapters
        first_last = self._models[::-1]
        self._by_fingerprint = {model.fingerprint: model for model in first_last}
        self._by_name = {alias: model for model in first_last for alias in model.info.aliases}
        self._by_name.update({model.name: model for model in first_last})
        self._order = NameOrder(self._by_name)

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models in the order of their flags."""
        return self._models

    def find(self, name: str, caller: Principal) -> ServedModel | None:
        """Return the base model that a name means where it may mean an adapter as well; None if it means none.

        The one place that decides between the two. An adapter that the caller may not use is none to it.

        Raises:
            InvalidParameterError: If it is the name of both: the base never answers where the adapter may be meant.
        """
        model = self._by_name.get(name)
        if (
            model is not None
            and self._adapters is not None
            and (entry := self._adapters.entry(name, caller)) is not None
        ):
            example = next((f"{name}:{label}" for label in sorted(entry.labels)), f"{name}@REVISION")
            raise InvalidParameterError(
                f"{name!r} is a base model and an adapter: write {example} for the adapter, another name of the base "
                f"model for that, or delete the adapter and import it under another name",
                field="model",
                metadata={"model": name},
            )
        return model

    @property
    def fingerprints(self) -> Collection[str]:
        """The fingerprints of the models."""
        return self._by_fingerprint.keys()

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
            close = self._order.like(name) or sorted(self._by_name)[:3]
            name = name[:MAX_NAME_CHARS]
            raise ModelNotFoundError(
                f"no base model {name!r} is served here; did you mean {', '.join(close)}? "
                "(an adapter goes into the field adapter)",
                metadata={"model": name},
            )
        return model
