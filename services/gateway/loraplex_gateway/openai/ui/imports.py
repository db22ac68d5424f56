"""The adapter store's imports, looked at once a second while a page shows them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import LoraplexError

from loraplex_gateway.adapters.import_list import newest_imports

if TYPE_CHECKING:
    from loraplex_common.peers import PeerChannel

LOOK_S: Final = 1.0
AWAY_S: Final = 5.0
"""Between two looks at a store that does not answer, or refuses."""


class ImportWatch:
    """Knows the newest imports.

    Args:
        store: Is asked; None has no imports.
    """

    def __init__(self, store: PeerChannel | None) -> None:
        self._store = store
        self._known: dict[str, Any] | None = None
        self._has_changed = False

    def take(self) -> dict[str, Any] | None:
        """Return all that is known, if it has changed since it was taken."""
        if not self._has_changed:
            return None
        self._has_changed = False
        return self._known

    async def follow(self) -> None:
        """Look again and again, until cancelled."""
        if self._store is None:
            await asyncio.Event().wait()
            return
        while True:
            try:
                found = {"imports": await newest_imports(self._store), "error": ""}
            except LoraplexError as error:
                found = {"imports": [], "error": error.message}
            if found != self._known:
                self._known, self._has_changed = found, True
            await asyncio.sleep(AWAY_S if found["error"] else LOOK_S)
