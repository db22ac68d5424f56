"""Why sources could not be resolved: remembered for a while, so that nothing is fetched in vain again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterForbiddenError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AdapterUntrustedError,
    DeadlineError,
    InvalidParameterError,
    LoraplexError,
    StoreUnavailableError,
)
from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from loraplex_adapter_store.repository.resolved import ResolvedRecords

FINAL: Final = (
    AdapterCorruptUploadError,
    AdapterForbiddenError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AdapterUntrustedError,
    InvalidParameterError,
)
"""Refusals that are the source's, and stay until it changes."""
PASSING: Final = (StoreUnavailableError, DeadlineError)
PASSING_S: Final = 5.0
"""How long a source that cannot be read now is not asked again."""

_log = get_logger()


class Refusals:
    """Remembers refusals, for all replicas.

    Args:
        records: Where they are kept.
        refusal_s: How long those that are the source's fault are.
    """

    def __init__(self, records: ResolvedRecords, refusal_s: float) -> None:
        self._records = records
        self._refusal_s = refusal_s

    async def check(self, key: str) -> None:
        """Raise the error by which a source was refused a moment ago; return if there is none."""
        if (error := await self._records.refusal(key)) is not None:
            raise error

    async def remember(self, key: str, error: LoraplexError) -> None:
        """Remember what is the source's fault; what is the tenant's or the store's is another matter the next time."""
        if not isinstance(error, FINAL + PASSING):
            return
        ttl_s = self._refusal_s if isinstance(error, FINAL) else error.retry_after_s or PASSING_S
        try:
            await self._records.refuse(key, error, ttl_s)
        except LoraplexError as trouble:
            _log.warning("a refusal cannot be remembered", reason=error.reason, error=trouble.message)
