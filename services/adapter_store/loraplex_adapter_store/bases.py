"""The base models this store knows, and which of them a checkpoint is for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.errors import AdapterIncompatibleError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base model and where its files are.

    Attributes:
        directory: Read for its tokenizer only, to compare an adapter's with.
    """

    info: BaseModelInfo
    directory: Path

    @property
    def names(self) -> tuple[str, ...]:
        """Every name an adapter may use for it."""
        return (self.info.name, *self.info.aliases)


class KnownBases:
    """Finds base models by name.

    Args:
        bases: At least one; two with equal fingerprints are one model under two names, which is fine.
    """

    def __init__(self, bases: Sequence[KnownBase]) -> None:
        if not bases:
            raise ValueError("at least one base model is needed: --model DIR")
        self._bases = tuple(bases)

    @classmethod
    def load(cls, directories: Sequence[Path], *, name: str | None, aliases: tuple[str, ...]) -> KnownBases:
        """Read model directories; ``name`` and ``aliases`` are the first one's.

        Raises:
            BaseModelError: If a directory is no base model we serve.
        """
        infos = [
            load_base_model(directory, name=name if index == 0 else None, aliases=aliases if index == 0 else ())
            for index, directory in enumerate(directories)
        ]
        return cls([KnownBase(info, directory) for info, directory in zip(infos, directories, strict=True)])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint -> name, for messages."""
        return {base.info.fingerprint: base.info.name for base in self._bases}

    def choose(self, declared: str, override: str) -> KnownBase:
        """Return the base model that a checkpoint is to be checked against.

        Args:
            declared: The checkpoint's ``base_model_name_or_path``. A known name decides; an unknown hub id is refused; a
                path (which says nothing on another machine) or nothing means the only base model, shapes deciding.
            override: Name given by whoever imports; beats ``declared``.

        Raises:
            ModelNotFoundError: If the override names no known base model.
            AdapterIncompatibleError: If the checkpoint is for another one, or does not say which of several.
        """
        known = ", ".join(name for base in self._bases for name in base.names)
        if override:
            if (base := self._named(override)) is None:
                raise ModelNotFoundError(f"base model {override!r} is not known here; known: {known}")
            return base
        if declared and (base := self._named(declared)) is not None:
            return base
        if _looks_like_hub_id(declared):
            raise AdapterIncompatibleError(
                f"the adapter is for base model {declared!r}, this store knows {known}; if they are the same, import with "
                f"base_model set or start the services with --model-alias {declared}",
                metadata={"adapter_base": declared[:200]},
            )
        if len(self._bases) > 1:
            raise AdapterIncompatibleError(
                f"the adapter does not say for which base model it is ({declared!r}); import with base_model set to one of {known}"
            )
        return self._bases[0]

    def _named(self, name: str) -> KnownBase | None:
        return next((base for base in self._bases if name in base.names), None)


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
