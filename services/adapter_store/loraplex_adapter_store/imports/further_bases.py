"""An import for several base models: the files become one revision for each, which one name serves.

A revision belongs to one base model: what it stores may depend on the base's weights and tokenizer. So an adapter that an
operator allows on further base models is checked against each, and has a revision, its counterpart, for each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError, LoraplexError
from loraplex_common.log import get_logger

from loraplex_adapter_store.answers import Answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_adapter_store.checkpoint.canonical import CanonicalForm
    from loraplex_adapter_store.imports.checker import CheckpointChecker
    from loraplex_adapter_store.imports.files import CheckpointFiles
    from loraplex_adapter_store.imports.targets import ImportOutcome, ImportTarget
    from loraplex_adapter_store.records import AdapterRecord
    from loraplex_adapter_store.repository.catalog import Catalog

_log = get_logger()
MAX_ALSO: Final = 8
FIELD: Final = "also_base_models"


def check_also(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of further base models.

    Raises:
        InvalidParameterError: If there are too many, one is empty, or two are equal.
    """
    if len(names) > MAX_ALSO:
        raise InvalidParameterError(f"{len(names)} further base models, at most {MAX_ALSO}", field=FIELD)
    if not all(names):
        raise InvalidParameterError("the name of a further base model is empty", field=FIELD)
    if len({name.casefold() for name in names}) < len(names):
        raise InvalidParameterError(f"a further base model is named twice: {', '.join(names)}"[:500], field=FIELD)
    return tuple(names)


@dataclass(frozen=True, slots=True)
class Counterparts:
    """The revisions of an import for further base models.

    Attributes:
        by_base: Base model's name -> revision.
        added: Those that the adapter's name did not have before.
    """

    by_base: Mapping[str, str]
    added: frozenset[str]

    @classmethod
    def of(cls, by_base: Mapping[str, str], known: Collection[str]) -> Counterparts:
        """Return them, of which some were known before."""
        return cls(by_base, frozenset(each for each in by_base.values() if each not in known))


NO_COUNTERPARTS: Final = Counterparts(MappingProxyType({}), frozenset())
Store = Callable[["CanonicalForm", str, "ImportTarget"], Awaitable["ImportOutcome"]]


class FurtherBases:
    """Imports files for further base models.

    Args:
        checker: Checks files against one base model.
        catalog: What is taken back if the import fails after all.
    """

    def __init__(self, checker: CheckpointChecker, catalog: Catalog) -> None:
        self._checker = checker
        self._catalog = catalog

    async def checked(
        self, files: CheckpointFiles, target: ImportTarget, store: Store
    ) -> tuple[CanonicalForm, Counterparts]:
        """Return the canonical form for the base model itself, and the revisions for further ones, stored under no label.

        One canonical form is in memory at a time: all are checked before the first is stored, then made again.

        Raises:
            InvalidParameterError: If two names mean one base model.
            LoraplexError: If the files do not fit one of the base models; nothing has changed then.
        """
        if not target.also:
            return await self._checker.check(files, target.base_model), NO_COUNTERPARTS
        await self._check_all(files, target)
        before = await self._catalog.get(target.name)
        known = before.revisions if before is not None else ()
        found: dict[str, str] = {}
        try:
            for name in target.also:
                outcome = await store(await self._checker.check(files, name), files.source, target.for_base(name))
                found[name] = outcome.revision.revision
            form = await self._checker.check(files, target.base_model)
        except BaseException:
            await self.take_back(target.name, Counterparts.of(found, known))
            raise
        return form, Counterparts.of(found, known)

    async def _check_all(self, files: CheckpointFiles, target: ImportTarget) -> None:
        own = (await self._checker.check(files, target.base_model)).base_fingerprint
        seen = {own: "the one that the adapter is for"}
        for name in target.also:
            try:
                fingerprint = (await self._checker.check(files, name)).base_fingerprint
            except LoraplexError as error:
                error.message = f"for the further base model {name}: {error.message}"
                raise
            if fingerprint in seen:
                raise InvalidParameterError(f"{name!r} is the same base model as {seen[fingerprint]}", field=FIELD)
            seen[fingerprint] = repr(name)

    async def take_back(self, name: str, counterparts: Counterparts) -> None:
        """Remove what a failed import has added under its name, but for what another import has come to use."""

        def without(record: AdapterRecord) -> AdapterRecord:
            used = record.labelled.union(*(bases.values() for bases in record.counterparts.values()))
            return record.without(counterparts.added - used).touched(time.time())

        if not counterparts.added:
            return
        try:
            await asyncio.shield(self._catalog.change(name, without, answer=Answer("import", name)))
        except LoraplexError as error:
            revisions = sorted(counterparts.added)
            _log.warning("revisions of a failed import stay", name=name, revisions=revisions, error=error.message)
