"""Connections to Valkey (or Redis), with the password and TLS files' content at the time a connection is opened."""

from __future__ import annotations

import asyncio
import ssl
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit, urlunsplit

import redis
from redis.asyncio.connection import ConnectionPool, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from loraplex_common.errors import LoraplexError
from loraplex_common.sentinel_url import SentinelUrl
from loraplex_common.tls_files import TlsFiles
from loraplex_common.valkey_errors import NO_CLUSTER, TranslatingClient
from loraplex_common.valkey_sentinel import sentinel_pool
from loraplex_common.watched_files import WatchedFiles

if TYPE_CHECKING:
    from loraplex_common.secret import Secret


CHECK_S: Final = 2.0
MAX_CONNECTIONS: Final = 8192
"""Connections of one client; the library refuses a command beyond 100. A store holds one for each engine whose hints it waits
for, a gateway one for each command under way, which are many for as long as Valkey stands still. Below Valkey's 10,000 clients."""


class UnservedValkeyError(OSError):
    """Valkey runs in a way that is not served; the message has the remedy."""


async def refuse_cluster(client: TranslatingClient) -> None:
    """Find out whether Valkey is a node of a cluster; one that does not answer within `CHECK_S` is not known to be.

    Raises:
        UnservedValkeyError: If it is one.
    """
    try:
        async with asyncio.timeout(CHECK_S):
            found = await client.info("cluster")
    except (LoraplexError, TimeoutError):
        return  # an answer to a later command says the same, see `valkey_errors`
    if found.get("cluster_enabled"):
        raise UnservedValkeyError(NO_CLUSTER)


def connect(
    url: str,
    *,
    password: Secret | None = None,
    sentinel_password: Secret | None = None,
    tls: TlsFiles | None = None,
    socket_timeout_s: float = 10.0,
) -> TranslatingClient:
    """Return a client that answers in bytes; it connects on first use and the caller closes it (``aclose``).

    Lost connections are retried three times within about a second, so a command may run twice. A failure after that is
    a `LoraplexError`, see `valkey_errors`. A changed password or TLS file takes effect with the next connection.

    Args:
        url: ``redis://host:port/db``, ``rediss://...`` (TLS), ``unix:///path``, or that of Sentinels, see
            `sentinel_url`.
        password: Password of the user in the URL, or of the default user; None takes the URL's, if it has one.
        sentinel_password: Password of the Sentinels themselves, for their default user.
        tls: With TLS: authorities to trust (the system's if it names none), and a certificate to show.
        socket_timeout_s: Limit for one answer; blocking commands must wait for less.

    Raises:
        OSError: If a TLS file cannot be used.
        ValueError: If there are two passwords, or the URL is malformed.
    """
    # There are no health checks: Valkey refuses PING while its disk is full, and reads must go on then.
    options: dict[str, Any] = {
        "max_connections": MAX_CONNECTIONS,
        "socket_timeout": socket_timeout_s,
        "socket_connect_timeout": 2.0,
        "retry": Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=3),
        "retry_on_error": [RedisConnectionError, RedisTimeoutError],
    }
    behind = SentinelUrl.parse(url)
    pool = (
        _pool_at(url, password, tls or TlsFiles(), options)
        if behind is None
        else _pool_behind(behind, password, sentinel_password, tls or TlsFiles(), options)
    )
    client: TranslatingClient = TranslatingClient.from_pool(pool)  # type: ignore[assignment]  # it is of the class it is asked of
    return client


def blocking_pool(
    url: str, password: Secret | None = None, *, socket_timeout_s: float = 5.0
) -> redis.ConnectionPool | None:
    """Return connections for threads to the Valkey of `connect`; None with TLS or Sentinels, where there are none such."""
    if SentinelUrl.parse(url) is not None or urlsplit(url).scheme == "rediss":
        return None
    options: dict[str, Any] = {"socket_timeout": socket_timeout_s, "protocol": 2}
    if urlsplit(url).scheme != "unix":
        options["socket_connect_timeout"] = 2.0
    if password is not None:
        url, user = _without_user(url)
        options["credential_provider"] = _Credentials(user, password)
    return redis.ConnectionPool.from_url(url, **options)


def _pool_at(url: str, password: Secret | None, tls: TlsFiles, options: dict[str, Any]) -> ConnectionPool:
    if password is not None:
        url, user = _without_user(url)
        options["credential_provider"] = _Credentials(user, password)
    pool = ConnectionPool.from_url(url, **options)
    if pool.connection_class is SSLConnection:
        pool.connection_class = _rotating(tls, SSLConnection)
    return pool


def _pool_behind(
    url: SentinelUrl, password: Secret | None, sentinel_password: Secret | None, tls: TlsFiles, options: dict[str, Any]
) -> ConnectionPool:
    if password is not None:
        options["credential_provider"] = _Credentials(url.user, password)
    return sentinel_pool(
        url,
        options=options,
        sentinel_password=None if sentinel_password is None else _Credentials(None, sentinel_password),
        rotating=partial(_rotating, tls),
    )


class _Credentials(CredentialProvider):
    """Gives the credentials for each new connection."""

    def __init__(self, user: str | None, password: Secret) -> None:
        self._user = user
        self._password = password

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        password = self._password.reveal()
        return (password,) if self._user is None else (self._user, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def _rotating(files: TlsFiles, base: type[SSLConnection]) -> type[SSLConnection]:
    """Return a class of TLS connections of that kind that are opened with the files' present content."""
    watched = WatchedFiles(
        files.paths,
        lambda: files.context(ssl.Purpose.SERVER_AUTH),
        what=", ".join(map(str, files.paths)),
        clock=time.monotonic,
    )

    def arguments(connection: SSLConnection) -> dict[str, Any]:
        return {**base._connection_arguments(connection), "ssl": watched.value()}

    return type("Connection", (base,), {"_connection_arguments": arguments})


def _without_user(url: str) -> tuple[str, str | None]:
    """Return a URL without its user, and the user: the library takes them from one place only."""
    parts = urlsplit(url)
    if parts.password is not None:
        raise ValueError("two passwords for Valkey: one in its URL, one besides")
    user, at, rest = parts.netloc.rpartition("@")
    bare = urlunsplit(parts._replace(netloc=rest if at else parts.netloc))
    if parts.scheme == "unix" and not bare.startswith("unix://"):  # as the library wants it
        bare = bare.replace("unix:", "unix://", 1)
    return bare, unquote(user) or None
