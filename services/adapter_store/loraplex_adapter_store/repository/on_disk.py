"""Waits until Valkey, and its replicas if Sentinels may put one in its place, have written a change to disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.errors import StoreUnavailableError
from loraplex_common.log import get_logger
from loraplex_common.valkey_errors import ValkeyRefusedError

if TYPE_CHECKING:
    from loraplex_adapter_store.repository import keys

_log = get_logger()
FSYNC_TIMEOUT_S: Final = 5.0


class OnDisk:
    """The rule of when a change is acknowledged.

    Args:
        num_replicas: Replicas that must have it on disk, besides Valkey itself.
    """

    def __init__(self, num_replicas: int = 0) -> None:
        self._num_replicas = num_replicas
        self._has_aof = True

    async def wait(self, connection: keys.Client) -> None:
        """Return once what a connection has written is on disk (WAITAOF).

        Raises:
            StoreUnavailableError: If Valkey or too few replicas confirm it in time.
        """
        if not self._has_aof:
            return
        try:
            local, replicas = await connection.execute_command(
                "WAITAOF", 1, self._num_replicas, round(FSYNC_TIMEOUT_S * 1000)
            )
        except ValkeyRefusedError as error:
            if not error.answer.startswith(("WAITAOF", "unknown command", "ERR")):
                raise
            # There is no append-only file, or the server is older than WAITAOF: the operator's choice, which is logged.
            _log.warning(
                "changes are acknowledged before they are on disk: turn Valkey's appendonly on", error=error.answer
            )
            self._has_aof = False
            return
        if local >= 1 and replicas >= self._num_replicas:
            return
        missing = "" if local < 1 else f": {replicas} of {self._num_replicas} replicas have (--redis-replicas)"
        raise StoreUnavailableError(
            f"Valkey has not confirmed within {FSYNC_TIMEOUT_S:.0f} s that the change is on disk{missing}; it may or may not "
            "last: repeat the call with the same request_id",
            retry_after_s=FSYNC_TIMEOUT_S,
        )
