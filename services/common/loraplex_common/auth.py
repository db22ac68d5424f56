"""Authentication: a key or a client certificate becomes a principal; nothing else in a request names its caller."""

from __future__ import annotations

import asyncio
import enum
import hashlib
import re
import time
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loraplex_common.admissions import Admission, Admissions
from loraplex_common.errors import UnauthenticatedError
from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from loraplex_common.keys_file import KeysFile

SCHEME: Final = "bearer "
HIGHEST_PRIORITY: Final = 3
"""`loraplex.v1.Priority` of the highest class."""
NORMAL_PRIORITY: Final = 2
HASH_PREFIX: Final = "sha256:"
CERTIFICATE_PREFIXES: Final = ("cn=", "san=")
_HASH: Final = re.compile(r"[0-9a-fA-F]{64}")
CHECK_EVERY_S: Final = 1.0
"""Longest time after a change of the keys file during which answers may still follow the old one, in seconds."""

_log = get_logger()


class Role(enum.StrEnum):
    """The role of a principal; `rights` says which calls each role may make."""

    TENANT = "tenant"
    ADMIN = "admin"
    GATEWAY = "gateway"
    ENGINE = "engine"
    METRICS = "metrics"


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """A caller after authentication.

    Attributes:
        name: Name for quotas, fairness and adapter permissions; a tenant's own name.
        role: Its role, which decides the calls it may make.
        group: Tenants of one group share cached prefixes; if empty, the tenant shares with no other tenant.
        highest_priority: Highest class (`loraplex.v1.Priority`) that its requests may ask for.
        is_listed: Whether it comes from a keys file; without one, every caller is let in with every right.
    """

    name: str
    role: Role = Role.TENANT
    group: str = ""
    highest_priority: int = NORMAL_PRIORITY
    is_listed: bool = True

    @property
    def is_admin(self) -> bool:
        """Whether it may manage and use every tenant's adapters."""
        return self.role is Role.ADMIN

    @property
    def uses_all_adapters(self) -> bool:
        """Whether it may use adapters restricted to other tenants: an administrator may if keys are configured."""
        return self.is_admin and self.is_listed

    @property
    def sharing_group(self) -> str:
        """Key of the cached prefixes that it shares; a group and a tenant of the same name have different keys."""
        return f"group:{self.group}" if self.group else f"tenant:{self.name}"


ANYBODY: Final = Principal(name="default", role=Role.ADMIN, highest_priority=HIGHEST_PRIORITY, is_listed=False)
"""The principal of every caller where no credentials are configured."""

_current: ContextVar[Principal] = ContextVar("loraplex_principal", default=ANYBODY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """Names in a client certificate that TLS has verified.

    Attributes:
        common_name: Common name of its subject; empty if there is none.
        alternative_names: DNS names, addresses and URIs, such as a SPIFFE id.
    """

    common_name: str = ""
    alternative_names: tuple[str, ...] = ()


def current_principal() -> Principal:
    """Return the principal that makes the call being handled."""
    return _current.get()


@contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    """Make ``principal`` the current one within the block, and in the tasks started in it."""
    token = _current.set(principal)
    try:
        yield
    finally:
        _current.reset(token)


def lookup_key(key: str) -> bytes:
    """Return the value by which a key of a keys file is found.

    Secrets are found by their hash, so the time of a lookup does not tell how much of a guess is right. Names of
    certificates are not secret, and no hash equals them.

    Args:
        key: A secret, ``sha256:HEX`` of one, or ``cn=NAME`` or ``san=NAME`` of a certificate.

    Raises:
        ValueError: If it is malformed; the message does not quote it.
    """
    if key.startswith(HASH_PREFIX):
        digest = key.removeprefix(HASH_PREFIX)
        if not _HASH.fullmatch(digest):
            raise ValueError("sha256: must be followed by 64 hexadecimal digits")
        return bytes.fromhex(digest)
    if key.startswith(CERTIFICATE_PREFIXES):
        if not key.partition("=")[2]:
            raise ValueError("cn= and san= must be followed by a name")
        return key.encode()
    if key.lower().startswith((HASH_PREFIX, *CERTIFICATE_PREFIXES)):
        # If it were taken as a secret, a caller that sends the certificate's name, or the hash, as a key would be let
        # in.
        raise ValueError("sha256:, cn= and san= are written in small letters")
    return _digest(key)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


class Authenticator:
    """Maps credentials to principals.

    Args:
        principals: Key as in a keys file (see `lookup_key`) -> principal. If empty, every caller is let in, as
            ``default`` or under the common name of a verified certificate.
        file: Source of the principals instead; read again when it changes.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        principals: Mapping[str, Principal] | None = None,
        *,
        file: KeysFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        given = principals or {}
        self._principals = {lookup_key(key): who for key, who in given.items()} if file is None else file.read()
        self._file = file
        self._clock = clock
        self._check_at = clock() + CHECK_EVERY_S
        self._admissions = Admissions(lambda: self._principals, clock)

    @classmethod
    def from_file(cls, path: Path | None) -> Authenticator:
        """Read a keys file, see `keys_file`; ``None`` means no keys.

        Raises:
            KeysFileError: If it cannot be used.
        """
        from loraplex_common.keys_file import KeysFile

        return cls() if path is None else cls(file=KeysFile(path))

    @property
    def is_open(self) -> bool:
        """True if no credentials are configured and every caller is let in."""
        return not self._principals

    @property
    def names_certificates(self) -> bool:
        """Whether some principals are let in by a certificate."""
        prefixes = tuple(prefix.encode() for prefix in CERTIFICATE_PREFIXES)
        return any(credential.startswith(prefixes) for credential in self._principals)

    @property
    def num_running(self) -> int:
        """Number of running calls that were let in by a credential."""
        return self._admissions.num_running

    def authenticate(self, authorization: str | None, *, certificate: Certificate | None = None) -> Principal:
        """Return the principal of a call, like `admit`."""
        return self.admit(authorization, certificate=certificate).principal

    def admit(self, authorization: str | None, *, certificate: Certificate | None = None) -> Admission:
        """Let a call in: by its key if it has one, else by its certificate.

        Args:
            authorization: Value of the ``authorization`` metadata or header: ``Bearer KEY``.
            certificate: The client's certificate, if TLS verified one.

        Raises:
            UnauthenticatedError: If keys are configured and the call has none of them.
        """
        self.refresh()
        if self.is_open:
            name = certificate.common_name if certificate is not None else ""
            return Admission(replace(ANYBODY, name=name) if name else ANYBODY, None, self._admissions)
        credential: bytes | None = None
        if authorization is not None:
            if authorization[: len(SCHEME)].lower() != SCHEME:
                raise UnauthenticatedError("authorization must be 'Bearer KEY'")
            credential = _digest(authorization[len(SCHEME) :].strip())
        elif certificate is not None:
            credential = self._line_of(certificate)
        if credential is None or credential not in self._principals:
            raise UnauthenticatedError(_unknown(authorization, certificate))
        return Admission(self._principals[credential], credential, self._admissions)

    def refresh(self) -> None:
        """Read the keys file again if it has changed; checks at most every `CHECK_EVERY_S`.

        If the file cannot be used, that is logged, and the principals known before stay valid. Calls whose credential
        is gone are ended, see `Admission.running`.
        """
        if self._file is None or self._clock() < self._check_at:
            return
        self._check_at = self._clock() + CHECK_EVERY_S
        changed = self._file.read_if_changed()
        if changed is not None:
            self._principals = changed
        if changed is None and not self._admissions.has_lapsed:
            return
        num_lapsed = self._admissions.end_lapsed()
        if changed is not None and num_lapsed:
            _log.info("ending calls whose credential is gone", num_calls=num_lapsed)

    async def follow(self) -> None:
        """Refresh for ever, also while no calls arrive: running calls must not outlive their right."""
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            self.refresh()

    def _line_of(self, certificate: Certificate) -> bytes | None:
        """Return the first of a certificate's names that is in the keys file."""
        names = [f"san={name}".encode() for name in certificate.alternative_names]
        if certificate.common_name:
            names.append(f"cn={certificate.common_name}".encode())
        return next((name for name in names if name in self._principals), None)


def _unknown(authorization: str | None, certificate: Certificate | None) -> str:
    if authorization is not None:
        return "unknown API key"
    if certificate is None:
        return "no API key: send metadata 'authorization: Bearer KEY'"
    names = [f"san={name}" for name in certificate.alternative_names]
    names += [f"cn={certificate.common_name}"] if certificate.common_name else []
    return f"no API key, and no line of the keys file names the client certificate: {', '.join(names)[:200]}"
