"""Valkey behind Sentinels: which server is the primary is asked before each new connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redis.asyncio import Redis
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis.credentials import CredentialProvider

    from loraplex_common.sentinel_url import SentinelUrl


class SentinelPool(SentinelConnectionPool):
    """The connections to the primary; they are cut when the Sentinels name another one."""

    async def aclose(self) -> None:
        """Close them, and those to the Sentinels."""
        try:
            await super().aclose()
        finally:
            await self.sentinel_manager.aclose()


def sentinel_pool(
    url: SentinelUrl,
    *,
    options: dict[str, Any],
    sentinel_password: CredentialProvider | None,
    rotating: Callable[[type[SSLConnection]], type[SSLConnection]],
) -> SentinelPool:
    """Return the connections to the primary that the Sentinels name.

    Args:
        url: Where they are.
        options: Options of connections to the primary.
        sentinel_password: Credentials of the Sentinels themselves; None if they ask for none.
        rotating: Makes a class of TLS connections use the TLS files' present content.
    """
    common = {name: value for name, value in options.items() if name.startswith(("max_", "socket_", "retry"))}
    manager = Sentinel([], sentinel_kwargs={})  # type: ignore[no-untyped-call]
    for host, port in url.sentinels:
        pool = ConnectionPool(
            connection_class=rotating(SSLConnection) if url.has_tls else Connection,
            host=host,
            port=port,
            **common | ({} if sentinel_password is None else {"credential_provider": sentinel_password}),
        )
        manager.sentinels.append(Redis.from_pool(pool))
    managed = rotating(SentinelManagedSSLConnection) if url.has_tls else SentinelManagedConnection
    return SentinelPool(url.primary, manager, connection_class=managed, db=url.database, **options)  # type: ignore[no-untyped-call]
