"""From what callers write for a revision, its first digits or all, to the digest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.errors import AdapterNotFoundError
from loraplex_common.ids import check_revision, find_revision, is_digest

if TYPE_CHECKING:
    from loraplex_common.auth import Principal

    from loraplex_adapter_store.aliases import AliasTable
    from loraplex_adapter_store.repository.catalog import Catalog


class RevisionFinder:
    """Looks among a name's own revisions first, then among all that the caller may see."""

    def __init__(self, catalog: Catalog, aliases: AliasTable) -> None:
        self._catalog = catalog
        self._aliases = aliases

    async def find(self, text: str, tenant: Principal, *, field: str, name: str = "") -> str:
        """Return the digest; a whole one is taken as it is.

        Raises:
            InvalidParameterError: If the text cannot name a revision, or several begin so.
            AdapterNotFoundError: If none begins so.
        """
        if is_digest(check_revision(text, field=field)):
            return text
        digest = find_revision(text, await self._own(name), field=field)
        digest = digest or find_revision(text, self._aliases.revisions(tenant), field=field)
        if digest is None:
            raise AdapterNotFoundError(f"no revision begins with {text}", field=field)
        return digest

    async def expected(self, text: str, *, field: str, name: str) -> str:
        """Return the digest that a label is said to point at; what is none of the name's stays, and will not match.

        Raises:
            InvalidParameterError: If the text is not empty and cannot name a revision, or several begin so.
        """
        if not text or is_digest(check_revision(text, field=field)):
            return text
        return find_revision(text, await self._own(name), field=field) or text

    async def _own(self, name: str) -> tuple[str, ...]:
        record = await self._catalog.get(name) if name else None
        return record.revisions if record is not None else ()
