"""Reads from one repository of a registry, and answers its demands for a credential."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode, urlsplit

from loraplex_common.errors import AdapterForbiddenError, AdapterNotFoundError, StoreUnavailableError

from loraplex_adapter_store.checkpoint.bounds import parse_json
from loraplex_adapter_store.imports.download import Download, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2

    from loraplex_adapter_store.credentials import Credential, Credentials

PATIENCE_S: Final = 60.0
MAX_TOKEN_BYTES: Final = 64 * 1024
MAX_TOKEN_VALUES: Final = 100
MAX_ANSWERS: Final = 3
"""Demands for a credential that are answered for one body: without one, with the credential, with a renewed one."""
_HOST: Final = re.compile(r"[A-Za-z0-9.-]+(:\d{1,5})?", re.ASCII)
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"', re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Registry:
    """A registry that may be imported from.

    Attributes:
        host: Host and port, as in ``oci://host:port/...``.
        scheme: ``https``, or ``http`` if the operator says so.
        credential: Name of a credential for requests that name none; may be empty.
    """

    host: str
    scheme: str = "https"
    credential: str = ""

    @classmethod
    def parse(cls, text: str) -> Registry:
        """Read ``host[:port][?credential=NAME]``; with ``http://`` before it for one without TLS.

        Raises:
            ValueError: If it is malformed.
        """
        address, _, option = text.partition("?credential=")
        scheme, mark, host = address.rpartition("://")
        if (mark and scheme not in ("http", "https")) or _HOST.fullmatch(host) is None:
            raise ValueError(f"{text!r} is not of the form [http://]host[:port][?credential=NAME]")
        return cls(host=host, scheme=scheme or "https", credential=option)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}"


class RegistrySession:
    """Reads bodies of one repository.

    A credential that is refused is read again from its file, once. Authorization goes to the registry and to the
    address of tokens that it names, never to the servers that it redirects to.

    Args:
        client: Sends requests.
        registry: The registry.
        repo: The repository.
        name: Name of the credential; empty for the registry's own, if it has one.
        credentials: Logins and tokens by name.

    Raises:
        InvalidParameterError: If the credential is unknown.
    """

    def __init__(
        self, client: httpx2.Client, registry: Registry, repo: str, name: str, credentials: Credentials
    ) -> None:
        self._client = client
        self._registry = registry
        self._repo = repo
        self._credentials = credentials
        self._credential = credentials.get(name or registry.credential)
        self._is_renewed = False
        self._is_proven = False
        self._authorization = self._given()

    def read(self, path: str, *, limit: int, take: Callable[[int], None], what: str, accept: str = "*/*") -> bytearray:
        """Return a body of the repository; blocks.

        Args:
            path: Its address below the repository's.
            limit: Most bytes; a longer body is refused.
            take: Waits for memory for that many more bytes.
            what: Name of the body, for errors.
            accept: Media types to ask for.

        Raises:
            AdapterNotFoundError: If there is no such body.
            AdapterForbiddenError: If the registry refuses the credential.
            Exception: In the cases of `Download.read`.
        """
        download = Download(
            f"{self._registry}/v2/{self._repo}/{path}",
            self._authorization,
            limit=limit,
            take=take,
            what=what,
            protocol=self._protocol(what, accept),
        )
        for _ in range(MAX_ANSWERS):
            try:
                data = download.read()
                self._is_proven = True
                return data
            except _UnauthorizedError as error:
                self._authorization = download.authorization = self._answer(error.challenge, what)
        raise self._refusal(what)

    def _answer(self, challenge: str, what: str) -> str:
        """Return the header that a registry's demand asks for."""
        if self._authorization is not None and not self._is_proven:
            self._renew(what)
        self._is_proven = False  # a token that was good has expired: ask for another one first
        scheme, _, parameters = challenge.partition(" ")
        if (given := self._given()) is not None:
            return given
        if scheme.lower() == "bearer":
            return f"Bearer {self._token(dict(_CHALLENGE.findall(parameters)), what)}"
        if scheme.lower() == "basic" and (basic := self._basic()) is not None:
            return basic
        raise self._refusal(what)

    def _given(self) -> str | None:
        """Return the header of a credential that is a token already."""
        if self._credential is None or self._credential.login is not None:
            return None
        return f"Bearer {self._credential.token}"

    def _basic(self) -> str | None:
        if self._credential is None or self._credential.login is None:
            return None
        user, password = self._credential.login
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def _token(self, asked: dict[str, str], what: str) -> str:
        """Return a token from the address that the registry names; for reading this repository, whatever it asks for."""
        realm = asked.get("realm", "")
        if urlsplit(realm).scheme not in ("https", self._registry.scheme):
            raise StoreUnavailableError(f"{what}: the registry names no https address for tokens", retry_after_s=10.0)
        service = {"service": asked["service"]} if asked.get("service") else {}
        query = urlencode({**service, "scope": f"repository:{self._repo}:pull"})
        download = Download(
            realm + ("&" if urlsplit(realm).query else "?") + query,
            self._basic(),
            limit=MAX_TOKEN_BYTES,
            take=lambda _: None,
            what=f"{what}: the registry's token",
            protocol=self._protocol(what, "application/json"),
        )
        try:
            fields = parse_json(bytes(download.read()), what="the token", max_values=MAX_TOKEN_VALUES)
            return str(fields.get("token") or fields["access_token"])
        except _UnauthorizedError:
            self._renew(what)
            return self._token(asked, what)
        except (LookupError, AttributeError, TypeError) as error:
            raise StoreUnavailableError(f"{what}: the registry's token is none", retry_after_s=10.0) from error

    def _renew(self, what: str) -> None:
        """Read the refused credential again.

        Raises:
            AdapterForbiddenError: If it is the same, or another one was refused before, or there is none.
        """
        old: Credential | None = self._credential
        if old is None or self._is_renewed:
            raise self._refusal(what)
        self._is_renewed = True
        self._credential = self._credentials.get_now(old.name)
        if self._credential == old and old.login is None:
            raise self._refusal(what)

    def _refusal(self, what: str) -> AdapterForbiddenError:
        if self._credential is None:
            return AdapterForbiddenError(f"{what}: the registry wants a credential; name one with access")
        return AdapterForbiddenError(
            f"{what}: the registry refuses credential {self._credential.name!r}: it has expired, or has no access"
        )

    def _protocol(self, what: str, accept: str) -> Protocol:
        def raise_for_status(response: httpx2.Response) -> None:
            status = response.status_code
            if status == 401:
                raise _UnauthorizedError(response.headers.get("www-authenticate", ""))
            if status == 403:
                raise self._refusal(what)
            if status == 404:
                raise AdapterNotFoundError(f"{what}: the registry has no such thing")
            raise StoreUnavailableError(f"{what}: the registry answered {status}", retry_after_s=10.0)

        return Protocol(
            client=lambda: self._client, raise_for_status=raise_for_status, accept=accept, patience_s=PATIENCE_S
        )


class _UnauthorizedError(Exception):
    """The server demands a credential.

    Attributes:
        challenge: How it wants one, its ``WWW-Authenticate`` header.
    """

    def __init__(self, challenge: str) -> None:
        super().__init__(challenge)
        self.challenge = challenge
