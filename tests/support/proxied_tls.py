"""Gateways that ask for certificates, behind a proxy that passes their TLS on (haproxy) or does its own on both sides (nginx, Envoy)."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.grpc_channel import open_channel
from support.certificates import TestAuthority, write
from support.gateway_rig import Rig
from support.proxied_gateways import backends, two_gateways
from support.proxies import CONFIGS, Proxy, replace_all, running_proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import grpc

TLS_FILES: Final = {"haproxy": "haproxy-tls.cfg", "nginx": "nginx-tls.conf", "envoy": "envoy-tls.yaml"}
SECRETS: Final = ("envoy-tls-identity.yaml", "envoy-tls-authority.yaml")
INSTALLED: Final = "/etc/loraplex"
NAME: Final = "gateway"
OWNERS: Final = ("gateway", "proxy", "client")


@dataclass(slots=True)
class Identities:
    """The certificates of gateways, proxy and clients; all trust two authorities.

    Attributes:
        folder: Has ``tls.crt``, ``tls.key``, ``check.pem`` and ``ca.crt`` in a folder of each owner.
        authorities: The old one and the new one.
        clients_ca: What gateways ask clients' certificates to be signed by.
    """

    folder: Path
    authorities: tuple[TestAuthority, TestAuthority] = field(init=False)
    clients_ca: Path = field(init=False)
    num_issued: int = 0

    def __post_init__(self) -> None:
        self.authorities = (TestAuthority(self.folder / "old", "old"), TestAuthority(self.folder / "new", "new"))
        self.clients_ca = self.folder / "clients-ca.crt"
        write(self.clients_ca, self._both)
        for owner in OWNERS:
            (self.folder / owner).mkdir()
            write(self.folder / owner / "ca.crt", self._both)
        self.rotate(self.authorities[0])

    @property
    def _both(self) -> bytes:
        return b"".join(authority.ca.read_bytes() for authority in self.authorities)

    def rotate(self, authority: TestAuthority, owners: Sequence[str] = OWNERS) -> None:
        """Replace owners' certificates by an authority's, file by file, as programs that renew certificates do."""
        self.num_issued += 1
        for owner in owners:
            issued = authority.issue(NAME, stem=f"{owner}-{self.num_issued}")
            cert, key, folder = issued.cert.read_bytes(), issued.key.read_bytes(), self.folder / owner
            write(folder / "check.pem", cert + key)
            write(folder / "tls.crt", cert)
            write(folder / "tls.key", key)

    def trust_only(self, authority: TestAuthority) -> None:
        """Have gateways take clients of one authority alone."""
        write(self.clients_ca, authority.ca.read_bytes())

    def shown_by(self, owner: str) -> str:
        """Return the certificate that an owner has now, PEM."""
        return (self.folder / owner / "tls.crt").read_text()

    def channel(self, target: str) -> grpc.aio.Channel:
        """Return a channel that shows the client's present certificate."""
        mine = self.folder / "client"
        return open_channel(
            target, tls_ca=mine / "ca.crt", tls_cert=mine / "tls.crt", tls_key=mine / "tls.key", tls_name=NAME
        )

    def gateway_options(self) -> dict[str, Any]:
        """Return the fields of a gateway's configuration."""
        mine = self.folder / "gateway"
        return {"tls_cert": mine / "tls.crt", "tls_key": mine / "tls.key", "tls_client_ca": self.clients_ca}


@dataclass(frozen=True, slots=True)
class Sealed:
    """Gateways behind a proxy, with TLS between all of them."""

    proxy: Proxy
    rigs: list[Rig]
    identities: Identities


@asynccontextmanager
async def sealed_gateways(kind: str, directory: Path, valkey_url: str, **overrides: Any) -> AsyncIterator[Sealed]:
    """Run two gateways with mutual TLS behind a proxy with its file of deploy/proxies.

    Args:
        kind: A key of `TLS_FILES`.
        directory: For all files.
        valkey_url: A real Valkey.
        overrides: Fields of the configuration of both gateways.
    """
    identities = Identities(directory)
    client = directory / "client"
    options = {"tls_ca": client / "ca.crt", "tls_cert": client / "tls.crt", "tls_key": client / "tls.key"}
    paths = {f"{INSTALLED}/tls": str(directory / "proxy")}
    if kind == "envoy":
        for name in SECRETS:
            write(directory / name, replace_all((CONFIGS / name).read_text(), paths))
        paths = {f"{INSTALLED}/{name}": str(directory / name) for name in SECRETS}
    async with AsyncExitStack() as stack:
        own = identities.gateway_options()
        rigs = await stack.enter_async_context(two_gateways(valkey_url, channel_options=options, **own, **overrides))
        behind = running_proxy(kind, directory, backends(rigs), file=TLS_FILES[kind], changes=paths)
        yield Sealed(await stack.enter_async_context(behind), rigs, identities)


async def certificate_at(target: str) -> str:
    """Return the certificate that a server shows a new connection, PEM."""
    host, _, port = target.rpartition(":")
    return await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))
