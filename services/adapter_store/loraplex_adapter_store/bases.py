"""The base models that this store knows, and which of them a checkpoint belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_common.base_model import BaseModelInfo, check_distinct_names, load_base_model
from loraplex_common.base_names import BaseName, folder_name
from loraplex_common.errors import AdapterIncompatibleError, InvalidParameterError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base model and the place of its files.

    Attributes:
        directory: Its files; the tokenizer is read, to compare an adapter's with it, and biases that an adapter trained on.
    """

    info: BaseModelInfo
    directory: Path

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which clients may ask for it."""
        return tuple(dict.fromkeys((self.info.name, *self.info.aliases)))

    def is_called(self, name: str) -> bool:
        """Return whether this is one of its names; hubs ignore the case of names."""
        return name.casefold() in {known.casefold() for known in self.names}

    def may_be(self, declared: BaseName) -> bool:
        """Return whether a declared name ends with one of its names, or with its folder's name.

        If both names have an owner, they were compared as a whole before, and differ: the answer is False.
        """
        known = [BaseName.parse(name) for name in (*self.names, folder_name(self.directory))]
        alike = [name for name in known if name.last.casefold() == declared.last.casefold()]
        return bool(alike) and not (declared.has_org and any(name.has_org for name in alike))


@dataclass(frozen=True, slots=True)
class ChosenBase:
    """The base model that a checkpoint is checked against.

    Attributes:
        warnings: What the author of the import should know about the choice.
    """

    base: KnownBase
    warnings: tuple[str, ...] = ()


class KnownBases:
    """Finds base models by name.

    Args:
        bases: At least one; two with equal fingerprints are one model under two names, which is allowed.
    """

    def __init__(self, bases: Sequence[KnownBase]) -> None:
        if not bases:
            raise ValueError("at least one base model is needed: --model DIR")
        self._bases = tuple(bases)

    @classmethod
    def load(
        cls, directories: Sequence[Path], *, name: str | None, aliases: tuple[str, ...], text_only: bool = False
    ) -> KnownBases:
        """Read model directories; ``name`` and ``aliases`` belong to the first one, ``text_only`` to all.

        Raises:
            BaseModelError: If a directory is no base model that can be served, or two models have one name.
        """
        infos = [
            load_base_model(
                directory,
                name=name if index == 0 else None,
                aliases=aliases if index == 0 else (),
                text_only=text_only,
            )
            for index, directory in enumerate(directories)
        ]
        check_distinct_names(infos)
        return cls([KnownBase(info, directory) for info, directory in zip(infos, directories, strict=True)])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint -> name, for messages."""
        return {base.info.fingerprint: base.info.name for base in self._bases}

    def check_adapter_name(self, name: str) -> None:
        """Refuse an adapter's name that means a base model: requests for it would never reach the adapter.

        Raises:
            InvalidParameterError: If it is a base model's name or alias.
        """
        if any(name in base.names for base in self._bases):
            raise InvalidParameterError(
                f"{name!r} is a name of the base model, which answers requests for it: give the adapter another name",
                field="name",
            )

    def choose(self, declared: str, override: str) -> ChosenBase:
        """Return the base model that a checkpoint is to be checked against.

        Args:
            declared: The checkpoint's ``base_model_name_or_path``. A known name decides, and so does a name that ends
                with exactly one base's name. Hub ids, pages and hub cache paths of other models are refused. An empty
                value, or another path, which means nothing on this machine, stands for the only base model. That gives
                a warning: shapes decide then, and shapes cannot separate two models of one shape.
            override: Name given with the import; takes precedence over ``declared``.

        Raises:
            ModelNotFoundError: If the override names no known base model.
            AdapterIncompatibleError: If the checkpoint is for another model, or does not say which of several.
        """
        if override:
            return ChosenBase(self._overriding(override))
        name = BaseName.parse(declared)
        found = self._called(declared.strip()) or self._called(name.hub_id)
        found = found or (self._distinct([base for base in self._bases if base.may_be(name)]) if name.last else [])
        if len(found) == 1:
            return ChosenBase(found[0])
        if not found and name.hub_id:
            raise self._for_another(name.hub_id)
        distinct = found or self._distinct(self._bases)
        if len(distinct) > 1:
            raise AdapterIncompatibleError(
                f"the adapter does not say for which base model it is ({declared[:200]!r}); import with `base_model` set to "
                f"one of {self._known(distinct)}"
            )
        return ChosenBase(distinct[0], (self._unsaid(declared, distinct[0]),))

    def _overriding(self, name: str) -> KnownBase:
        if not (found := self._called(name)):
            raise ModelNotFoundError(f"base model {name!r} is not known here; known: {self._known(self._bases)}")
        return found[0]

    def _called(self, name: str) -> list[KnownBase]:
        return [base for base in self._bases if base.is_called(name)][:1] if name else []

    @staticmethod
    def _distinct(bases: Sequence[KnownBase]) -> list[KnownBase]:
        """Return the bases without those that are an earlier base under another name."""
        first: dict[str, KnownBase] = {}
        for base in bases:
            first.setdefault(base.info.fingerprint, base)
        return list(first.values())

    @staticmethod
    def _known(bases: Sequence[KnownBase]) -> str:
        return ", ".join(name for base in bases for name in base.names)

    def _for_another(self, declared: str) -> AdapterIncompatibleError:
        parents = [base.info.name for base in self._bases if base.info.config.get("_name_or_path") == declared]
        hint = f" ({parents[0]} says that it was made from it, which does not make them the same)" if parents else ""
        distinct = self._distinct(self._bases)
        target = distinct[0].info.name if len(distinct) == 1 else "the one that is meant"
        return AdapterIncompatibleError(
            f"the adapter is for base model {declared[:200]!r}{hint}, this store knows {self._known(self._bases)}; if they "
            f"are the same weights, import with `base_model` set to {target}, or start the services with --model-alias "
            f"{declared[:200]}",
            metadata={"adapter_base": declared[:200]},
        )

    @staticmethod
    def _unsaid(declared: str, base: KnownBase) -> str:
        says = (
            f"names its base by a path, {declared[:200]!r}" if BaseName.parse(declared).last else "names no base model"
        )
        return (
            f"the adapter {says}: it fits the shapes of {base.info.name}, which does not prove that it was trained on it; "
            f"`base_model` set to {base.info.name} says that it was"
        )
