"""How to reach a server: shared by both clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from loraplex_common.grpc_channel import CHANNEL_OPTIONS, open_channel

DEFAULT_TARGET: Final = "127.0.0.1:8500"
DEFAULT_STORE_PORT: Final = 8510

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """Where a server is, and the credentials that the client shows it.

    Attributes:
        target: ``host:port`` or any gRPC name.
        tls_ca: Certificates to trust, PEM; turns TLS on.
        tls_cert: Client certificate, PEM, for mutual TLS; together with ``tls_key``.
        tls_name: Name that has to stand in the server's certificate instead of the host dialled.
        api_key: Sent as ``authorization: Bearer KEY`` with every call.
    """

    target: str
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_name: str | None = None
    api_key: str | None = None

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls_cert is not None and self.tls_ca is None):
            raise ValueError("a client certificate needs tls_cert, tls_key and tls_ca")

    @property
    def metadata(self) -> Metadata:
        """Metadata of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def open(self) -> grpc.Channel:
        """Open a blocking channel; the caller closes it."""
        if self.tls_ca is None:
            return grpc.insecure_channel(self.target, options=CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(
            self.tls_ca.read_bytes(),
            self.tls_key.read_bytes() if self.tls_key else None,
            self.tls_cert.read_bytes() if self.tls_cert else None,
        )
        named = () if self.tls_name is None else (("grpc.ssl_target_name_override", self.tls_name),)
        return grpc.secure_channel(self.target, credentials, options=(*CHANNEL_OPTIONS, *named))

    def open_aio(self) -> grpc.aio.Channel:
        """Open an asyncio channel; the caller closes it. Credentials go with the calls, see `metadata`."""
        return open_channel(
            self.target, tls_ca=self.tls_ca, tls_cert=self.tls_cert, tls_key=self.tls_key, tls_name=self.tls_name
        )


def store_beside(target: str) -> str:
    """Return where the adapter store is by default: the gateway's host, port `DEFAULT_STORE_PORT`."""
    host, _, own_port = target.rpartition(":")
    return f"{host if host and own_port.isdigit() else target}:{DEFAULT_STORE_PORT}"
