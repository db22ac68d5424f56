"""The URL of a Valkey behind Sentinels; known without Valkey's library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

SCHEME: Final = "redis-sentinel"
TLS_SCHEME: Final = "rediss-sentinel"
DEFAULT_PORT: Final = 26379
FORM: Final = f"{SCHEME}://[USER@]HOST[:PORT][,HOST[:PORT]...][/DATABASE]#PRIMARY"


@dataclass(frozen=True, kw_only=True, slots=True)
class SentinelUrl:
    """What a URL says, in the form that other clients have, too (Lettuce).

    Attributes:
        sentinels: Host and port of each.
        primary: Name under which the Sentinels know the primary.
        user: User of the primary.
        database: Number of the database.
        has_tls: Whether Sentinels and servers speak TLS.
    """

    sentinels: tuple[tuple[str, int], ...]
    primary: str
    user: str | None
    database: int
    has_tls: bool

    @classmethod
    def parse(cls, url: str) -> SentinelUrl | None:
        """Read a URL; None if it is of another scheme.

        Raises:
            ValueError: If it is malformed; it is not quoted, as it may hold a password.
        """
        scheme, _, rest = url.partition("://")
        if scheme not in (SCHEME, TLS_SCHEME):
            return None
        address, _, primary = rest.partition("#")
        hosts, _, database = address.partition("/")
        user, at, hosts = hosts.rpartition("@")
        if ":" in user:
            raise ValueError(
                "the password of a Valkey behind Sentinels goes into --redis-password-file, not into its URL"
            )
        if not primary or (database and not database.isdecimal()):
            raise ValueError(f"the URL of a Valkey behind Sentinels has the form {FORM}")
        return cls(
            sentinels=tuple(_address(host) for host in hosts.split(",")),
            primary=primary,
            user=(unquote(user) or None) if at else None,
            database=int(database or 0),
            has_tls=scheme == TLS_SCHEME,
        )


def _address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError as error:
        raise ValueError(f"{text!r} is no address of a Sentinel: {error}") from error
    if not parts.hostname or parts.path:
        raise ValueError(f"{text!r} is no address of a Sentinel")
    return parts.hostname, port
