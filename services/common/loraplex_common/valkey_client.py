"""Connections to Valkey (or Redis), with the password and TLS files' content at the time a connection is opened."""

from __future__ import annotations

import ssl
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from redis.asyncio.connection import ConnectionPool, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from loraplex_common.tls_files import TlsFiles
from loraplex_common.valkey_errors import TranslatingClient
from loraplex_common.watched_files import WatchedFiles

if TYPE_CHECKING:
    from loraplex_common.secret import Secret


def connect(
    url: str, *, password: Secret | None = None, tls: TlsFiles | None = None, socket_timeout_s: float = 10.0
) -> TranslatingClient:
    """Return a client that answers in bytes; it connects on first use and the caller closes it (``aclose``).

    Lost connections are retried three times within about a second, so a command may run twice. A failure after that is
    a `LoraplexError`, see `valkey_errors`. A changed password or TLS file takes effect with the next connection.

    Args:
        url: ``redis://host:port/db``, ``rediss://...`` (TLS) or ``unix:///path``.
        password: Password of the user in the URL, or of the default user; None takes the URL's, if it has one.
        tls: For ``rediss://``: authorities to trust (the system's if it names none), and a certificate to show.
        socket_timeout_s: Limit for one answer; blocking commands must wait for less.

    Raises:
        OSError: If a TLS file cannot be used.
        ValueError: If there are two passwords.
    """
    options: dict[str, Any] = {}
    if password is not None:
        url, user = _without_user(url)
        options["credential_provider"] = _Credentials(user, password)
    # There are no health checks: Valkey refuses PING while its disk is full, and reads must go on then.
    pool = ConnectionPool.from_url(
        url,
        socket_timeout=socket_timeout_s,
        socket_connect_timeout=2.0,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=3),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
        **options,
    )
    if pool.connection_class is SSLConnection:
        pool.connection_class = _rotating(tls or TlsFiles())
    client: TranslatingClient = TranslatingClient.from_pool(pool)  # type: ignore[assignment]  # it is of the class it is asked of
    return client


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


def _rotating(files: TlsFiles) -> type[SSLConnection]:
    """Return a class of TLS connections that are opened with the files' present content."""
    watched = WatchedFiles(
        files.paths,
        lambda: files.context(ssl.Purpose.SERVER_AUTH),
        what=", ".join(map(str, files.paths)),
        clock=time.monotonic,
    )

    class Connection(SSLConnection):
        def _connection_arguments(self) -> dict[str, Any]:
            return {**super()._connection_arguments(), "ssl": watched.value()}

    return Connection


def _without_user(url: str) -> tuple[str, str | None]:
    """Return a URL without its user, and the user: the library takes them from one place only."""
    parts = urlsplit(url)
    if parts.password is not None:
        raise ValueError("two passwords for Valkey: one in its URL, one besides")
    user, at, rest = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=rest if at else parts.netloc)), unquote(user) or None
