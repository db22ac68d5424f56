"""Who calls: API keys and client certificates become a tenant; nothing a request says about itself does."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterForbiddenError, UnauthenticatedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SCHEME: Final = "bearer "
CERTIFICATE_PREFIX: Final = "cn="


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """A caller after authentication.

    Attributes:
        name: What quotas, fairness and adapter permissions are counted under.
        is_admin: May manage adapters of every tenant.
    """

    name: str
    is_admin: bool = False


DEFAULT_TENANT: Final = Tenant(name="default", is_admin=True)
"""Everybody, where no credentials are configured."""

_current: ContextVar[Tenant] = ContextVar("loraplex_tenant", default=DEFAULT_TENANT)


class KeysFileError(ValueError):
    """The API keys file cannot be used; the message names file and line."""


def current_tenant() -> Tenant:
    """Return the tenant of the call being handled."""
    return _current.get()


def require_admin() -> Tenant:
    """Return the current tenant if it is an administrator.

    Raises:
        AdapterForbiddenError: If it is not.
    """
    tenant = current_tenant()
    if not tenant.is_admin:
        raise AdapterForbiddenError(f"tenant {tenant.name!r} may not do this: its API key has no admin right")
    return tenant


@contextmanager
def acting_as(tenant: Tenant) -> Iterator[None]:
    """Make ``tenant`` the current one within the block (and the tasks started in it)."""
    token = _current.set(tenant)
    try:
        yield
    finally:
        _current.reset(token)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


class Authenticator:
    """Maps credentials to tenants.

    Args:
        keys: API key, or ``cn=NAME`` for a client certificate with that common name, to tenant. Empty: everybody is
            let in, as ``default`` or under the common name of a verified certificate.
    """

    def __init__(self, keys: Mapping[str, Tenant] | None = None) -> None:
        # Looked up by hash: how long a lookup takes tells nothing about how much of a guessed key is right.
        self._tenants = {_digest(key): tenant for key, tenant in (keys or {}).items()}

    @classmethod
    def from_file(cls, path: Path | None) -> Authenticator:
        """Read ``KEY TENANT [admin]`` lines; ``#`` starts a comment, ``None`` means no keys.

        Raises:
            KeysFileError: If the file is missing, empty, or a line is malformed or repeats a key.
        """
        if path is None:
            return cls()
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise KeysFileError(f"{path}: {error.strerror}") from error
        keys: dict[str, Tenant] = {}
        for number, line in enumerate(lines, start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) not in (2, 3) or words[2:] not in ([], ["admin"]):
                raise KeysFileError(f"{path}:{number}: expected 'KEY TENANT [admin]'")
            if words[0] in keys:
                raise KeysFileError(f"{path}:{number}: this key appears twice")
            keys[words[0]] = Tenant(name=words[1], is_admin=len(words) == 3)
        if not keys:
            # An empty file would let everybody in, which is hardly what whoever configured it meant.
            raise KeysFileError(f"{path}: holds no keys")
        return cls(keys)

    @property
    def is_open(self) -> bool:
        """True if no credentials are configured and everybody is let in."""
        return not self._tenants

    def authenticate(self, authorization: str | None, *, common_name: str | None = None) -> Tenant:
        """Return the tenant of a call.

        Args:
            authorization: Value of the ``authorization`` metadata or header: ``Bearer KEY``.
            common_name: Common name of the client certificate, if TLS verified one.

        Raises:
            UnauthenticatedError: If keys are configured and the call brings none of them.
        """
        if self.is_open:
            return Tenant(name=common_name, is_admin=True) if common_name else DEFAULT_TENANT
        tenant: Tenant | None = None
        if authorization is not None:
            if authorization[: len(SCHEME)].lower() != SCHEME:
                raise UnauthenticatedError("authorization must be 'Bearer KEY'")
            key = authorization[len(SCHEME) :].strip()
            if not key.startswith(CERTIFICATE_PREFIX):  # a certificate's name is no secret
                tenant = self._tenants.get(_digest(key))
        elif common_name is not None:
            tenant = self._tenants.get(_digest(CERTIFICATE_PREFIX + common_name))
        if tenant is None:
            what = "unknown API key" if authorization else "no API key: send metadata 'authorization: Bearer KEY'"
            raise UnauthenticatedError(what)
        return tenant
