"""Finds the digest of a revision that a caller names by its first digits or by all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.errors import AdapterNotFoundError
from loraplex_common.ids import check_revision, find_revision, is_digest

if TYPE_CHECKING:
    from loraplex_common.auth import Principal

    from loraplex_adapter_store.aliases import AliasTable
    from loraplex_adapter_store.repository.catalog import Catalog


class RevisionFinder:
    """Searches a name's own revisions first, then all revisions that the caller may see."""

    def __init__(self, catalog: Catalog, aliases: AliasTable) -> None:
        self._catalog = catalog
        self._aliases = aliases

    async def find(self, text: str, tenant: Principal, *, field: str, name: str = "") -> str:
        """Return the digest; a complete digest is returned unchanged.

        Raises:
            InvalidParameterError: If the text cannot name a revision, or several revisions begin with it.
            AdapterNotFoundError: If no revision begins with it.
        """
        if is_digest(check_revision(text, field=field)):
            return text
        digest = find_revision(text, await self._own(name), field=field)
        digest = digest or find_revision(text, self._aliases.revisions(tenant), field=field)
        if digest is None:
            raise AdapterNotFoundError(f"no revision begins with {text}", field=field)
        return digest

    async def expected(self, text: str, *, field: str, name: str) -> str:
        """Return the digest that a label is expected to point at; a text that names none of the name's never matches.

        Raises:
            InvalidParameterError: If the text is not empty and cannot name a revision, or several revisions begin with
                it.
        """
        if not text or is_digest(check_revision(text, field=field)):
            return text
        return find_revision(text, await self._own(name), field=field) or text

    async def _own(self, name: str) -> tuple[str, ...]:
        record = await self._catalog.get(name) if name else None
        return record.revisions if record is not None else ()
