"""Tells engines of revisions that a push has taken off a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger

from loraplex_adapter_store.repository import keys

if TYPE_CHECKING:
    from collections.abc import Collection

    from loraplex_adapter_store.hints import Hints

_log = get_logger()


class ReleasedRevisions:
    """Drops released revisions from engines at once: the garbage collector, which comes later, waits for them.

    Requests that run with such a revision finish; the engine drops it behind them.
    """

    def __init__(self, client: keys.Client, hints: Hints) -> None:
        self._client = client
        self._hints = hints

    async def forget(self, digests: Collection[str]) -> None:
        """Drop those of some revisions that no name has; never fails, as the collector does it otherwise."""
        try:
            for digest in sorted(digests):
                with keys.translated():
                    is_referenced = await self._client.exists(keys.references(digest))
                if not is_referenced:
                    await self._hints.evict("", digest)
        except LoraplexError as error:
            _log.warning("engines drop released revisions later", error=error.message)
