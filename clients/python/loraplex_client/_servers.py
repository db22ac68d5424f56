"""Which server is called with what: what the caller says, else what a profile says, else the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_client._connection import DEFAULT_TARGET, Connection, store_beside
from loraplex_client._gateways import split_targets
from loraplex_client._profiles import ProfileError, ServerProfile, found_profile, read_profile

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What the caller proves itself with; whatever is None is looked for in a profile.

    Attributes:
        api_key: Sent with every call.
        tls_ca: Certificates to trust, PEM; turns TLS on.
        tls_cert: Client certificate, PEM; with ``tls_key``.
    """

    api_key: str | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


class Servers:
    """The servers of one deployment.

    Args:
        target: The gateway, or several, in a sequence or separated by commas; by default the profile's, else the local
            one.
        store_target: The adapter store; by default the profile's, else beside the (first) gateway.
        credentials: Count before those of a profile.
        profile: A profile's file; without one, that of a ``loraplex serve`` that runs at the address is used.

    Attributes:
        gateways: How to reach each gateway.
        store: How to reach the adapter store.

    Raises:
        ProfileError: If a profile, or a key that it names, cannot be used.
        ValueError: If no gateway is named.
    """

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        store_target: str | None = None,
        *,
        credentials: Credentials | None = None,
        profile: Path | None = None,
    ) -> None:
        self._credentials = credentials or Credentials()
        self._profile = read_profile(profile) if profile is not None else None
        named = split_targets(target) if target is not None else ()
        near = self._profile
        if near is None:
            near = found_profile("gateway", named[0] if named else DEFAULT_TARGET)
        known = near.gateway if near is not None else ServerProfile()
        first, *others = named or (known.target or DEFAULT_TARGET,)
        self.gateways = (
            self._connection(first, known),
            *(self._connection(other, self._known("gateway", other)) for other in others),
        )
        if store_target is None:
            known = near.store if near is not None else ServerProfile()
            self.store = self._connection(known.target or store_beside(first), known)
        else:
            self.store = self._connection(store_target, self._known("store", store_target))

    def engine(self, target: str) -> Connection:
        """Return how to reach an engine."""
        return self._connection(target, self._known("engine", target))

    def _known(self, kind: str, target: str) -> ServerProfile:
        profile = self._profile if self._profile is not None else found_profile(kind, target)
        found: ServerProfile = getattr(profile, kind, None) or ServerProfile()
        return found

    def _connection(self, target: str, known: ServerProfile) -> Connection:
        own = self._credentials
        has_certificate = own.tls_cert is not None or own.tls_key is not None
        return Connection(
            target=target,
            tls_ca=own.tls_ca or known.tls_ca,
            tls_cert=own.tls_cert if has_certificate else known.tls_cert,
            tls_key=own.tls_key if has_certificate else known.tls_key,
            tls_name=None if own.tls_ca else known.tls_name,
            api_key=own.api_key or (read_key(known.api_key_file) if known.api_key_file else None),
        )


def read_key(path: Path) -> str:
    """Return the API key in a file: its only line.

    Raises:
        ProfileError: If there is none.
    """
    try:
        words = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ProfileError(f"API key {path}: {cause}") from error
    if len(words) != 1:
        raise ProfileError(f"API key {path}: expected one line with the key, nothing else")
    return words[0]
