"""Certificates, keys and authorities in files that are rotated while the process runs."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc

from loraplex_common.watched_files import WatchedFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_READS: Final = 5
ROTATION_S: Final = 0.02
"""Longest time in which the files of one rotation are replaced, in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """The PEM files of one side of a connection.

    Attributes:
        cert: Certificate chain.
        key: The certificate's private key, without a passphrase.
        ca: Authorities that must have signed the other side's certificates.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths that are set."""
        return tuple(path for path in (self.cert, self.key, self.ca) if path is not None)

    def context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        """Return an SSL context with the files' present content; making it proves that they fit together.

        Raises:
            OSError: If a file cannot be read, or OpenSSL cannot use it; the message names files.
        """
        context = ssl.create_default_context(purpose, cafile=self.ca if purpose is ssl.Purpose.SERVER_AUTH else None)
        try:
            if self.cert is not None:
                # A passphrase that cannot be given: otherwise OpenSSL would ask for one on the terminal.
                context.load_cert_chain(self.cert, self.key, password=lambda: "")
            if self.ca is not None and purpose is ssl.Purpose.CLIENT_AUTH:
                context.load_verify_locations(cafile=self.ca)
                context.verify_mode = ssl.CERT_REQUIRED
                _forbid_resumption(context)
        except OSError as error:
            names = ", ".join(map(str, self.paths))
            raise OSError(f"TLS files {names} cannot be used together: {error.strerror or error}") from error
        return context

    def contents(self, purpose: ssl.Purpose) -> TlsContents:
        """Return the files' bytes, checked by `context`.

        Files are replaced one after another. If they do not fit together, or change meanwhile, they are read again
        after a moment, a few times.

        Raises:
            OSError: In the cases of `context`, or if they keep changing.
        """
        for num_left in reversed(range(MAX_READS)):
            before = self._read()
            try:
                self.context(purpose)
            except OSError:
                if not num_left:
                    raise
            else:
                if self._read() == before:
                    return before
            time.sleep(ROTATION_S)
        raise OSError(f"TLS files {', '.join(map(str, self.paths))} keep changing")

    def _read(self) -> TlsContents:
        cert, key, ca = (None if path is None else path.read_bytes() for path in (self.cert, self.key, self.ca))
        return TlsContents(cert=cert, key=key, ca=ca)


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsContents:
    """The content of `TlsFiles`, PEM."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        """Return the certificates that a gRPC server shows and requires."""
        assert self.key is not None
        assert self.cert is not None
        return grpc.ssl_server_certificate_configuration([(self.key, self.cert)], self.ca)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return the certificates that a gRPC client shows and trusts."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)


def watch_tls(files: TlsFiles, purpose: ssl.Purpose, *, clock: Callable[[], float] = time.monotonic) -> WatchedTls:
    """Return the files' content, read again when they change.

    Args:
        files: The files.
        purpose: The peers to authenticate: ``CLIENT_AUTH`` for servers, ``SERVER_AUTH`` for clients.
        clock: Monotonic seconds.

    Raises:
        OSError: If they cannot be used.
    """
    return WatchedFiles(files.paths, lambda: files.contents(purpose), what=_names(files.paths), clock=clock)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return credentials of a gRPC server that shows every new connection the files' content at that time.

    Raises:
        OSError: If they cannot be used now.
    """
    watched = watch_tls(files, ssl.Purpose.CLIENT_AUTH)
    shown = watched.value()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        now = watched.value()
        if now is shown:
            return None
        shown = now
        return now.server_configuration()

    return grpc.dynamic_ssl_server_credentials(
        shown.server_configuration(),
        fetch,  # type: ignore[arg-type]  # None means "unchanged", which the stubs do not know
        require_client_authentication=files.ca is not None,
    )


class RotatingServerContext:
    """An SSL context of an asyncio server that shows every new connection the files' content at that time.

    Args:
        files: The files.

    Attributes:
        context: For the server.

    Raises:
        OSError: If they cannot be used now.
    """

    def __init__(self, files: TlsFiles) -> None:
        make = ssl.Purpose.CLIENT_AUTH
        self._watched = WatchedFiles(
            files.paths, lambda: files.context(make), what=_names(files.paths), clock=time.monotonic
        )
        self.context = files.context(make)
        # Called for each handshake, with or without a server name: the connection uses certificate and authorities of
        # the context that is set here.
        self.context.sni_callback = self._switch

    def _switch(self, connection: ssl.SSLObject, _name: str | None, _first: ssl.SSLContext) -> None:
        connection.context = self._watched.value()


def _forbid_resumption(context: ssl.SSLContext) -> None:
    """Require a certificate on every connection: a resumed session would not show it, and the authority may be gone."""
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


WatchedTls = WatchedFiles[TlsContents]
