"""How a service connects to other services: trusted authorities and credentials, renewed while connections are open."""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_common.grpc_channel import make_channel
from loraplex_common.log import get_logger
from loraplex_common.peer_targets import RESOLVE_S, channel_target, parse_targets
from loraplex_common.secret import Secret
from loraplex_common.tls_files import TlsFiles, watch_tls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from loraplex_common.tls_files import WatchedTls

_log = get_logger()
LOOK_S: Final = 1.0
"""Seconds between checks, by a task that waits for a connection, whether there are newer credentials."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerIdentity:
    """The authorities that a service trusts and the credentials it shows, towards engines, stores and Valkey.

    Attributes:
        tls_ca: Authorities of the peers' certificates, PEM; turns TLS on. None is plain text.
        tls_cert: Client certificate, PEM.
        tls_key: The client certificate's private key, PEM.
        api_key: Sent as ``authorization: Bearer KEY`` with every call; None sends none.
    """

    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    api_key: Secret | None = None


class Peers:
    """Opens channels with an identity whose files are read again when they change.

    Args:
        identity: Authorities and credentials; none by default.

    Raises:
        OSError: If a file cannot be used.
    """

    def __init__(self, identity: PeerIdentity | None = None) -> None:
        self._identity = identity or PeerIdentity()
        self._tls: WatchedTls | None = None
        if self._identity.tls_ca is not None:
            files = TlsFiles(cert=self._identity.tls_cert, key=self._identity.tls_key, ca=self._identity.tls_ca)
            self._tls = watch_tls(files, ssl.Purpose.SERVER_AUTH, clock=time.monotonic)

    def without_key(self) -> Peers:
        """Return the same without the key: its calls carry the key of another party, or none."""
        return Peers(replace(self._identity, api_key=None))

    @property
    def version(self) -> int:
        """Rises whenever a new connection would use other TLS files. The key does not count: calls carry it."""
        return 0 if self._tls is None else self._tls.version

    def open(self, target: str, *, tls_name: str | None = None) -> grpc.aio.Channel:
        """Open a channel with the present identity; the caller closes it.

        Args:
            target: ``host:port`` or any gRPC name.
            tls_name: Name that the server's certificate must have, instead of the host in ``target``.
        """
        credentials = None if self._tls is None else self._tls.value().channel_credentials()
        return make_channel(target, credentials, tls_name=tls_name, key=self._identity.api_key)


class PeerChannel:
    """A channel to one peer for as long as the service runs; it is replaced once the identity has changed.

    Calls under way end on the channel that they began on. Calls go to several addresses in turn, as far as they answer; if
    a call cannot be made at one address, it is made at another.

    Args:
        peers: Opens the channel.
        target: ``host:port`` or any gRPC name; or several of ``host:port`` separated by commas.
        tls_name: Name that the server's certificate must have, instead of the host in ``target``.
    """

    def __init__(self, peers: Peers, target: str, *, tls_name: str | None = None) -> None:
        self._peers = peers
        self._target = target
        self._tls_name = tls_name
        self._version = peers.version
        self._has_several = len(parse_targets(target)) > 1
        self._resolved = "" if self._has_several else target
        self._resolved_at = -RESOLVE_S
        self._channel: grpc.aio.Channel | None = None if self._has_several else peers.open(target, tls_name=tls_name)
        self._num_users: dict[grpc.aio.Channel, int] = {} if self._channel is None else {self._channel: 0}

    @property
    def is_outdated(self) -> bool:
        """Whether the next user gets a new channel."""
        return self._peers.version != self._version

    @asynccontextmanager
    async def use(self) -> AsyncIterator[grpc.aio.Channel]:
        """Give out the channel for the block; it stays open while the block runs."""
        await self._resolve()
        channel = await self._renew()
        self._num_users[channel] += 1
        try:
            yield channel
        finally:
            if channel in self._num_users:  # otherwise `close` has closed it
                self._num_users[channel] -= 1
                await self._close_unused()

    async def outdated(self) -> None:
        """Return once the next user would get a new channel; for tasks that wait for a connection."""
        while not self.is_outdated:  # noqa: ASYNC110 -- files have no event to wait for
            await asyncio.sleep(LOOK_S)

    async def close(self) -> None:
        """Close every channel; calls that run are cancelled."""
        channels, self._num_users = list(self._num_users), {}
        for channel in channels:
            await channel.close()

    async def _resolve(self) -> None:
        """Look the addresses of several names up, from time to time; where none resolves, those known stay."""
        if not self._has_several or time.monotonic() - self._resolved_at < RESOLVE_S:
            return
        try:
            resolved = await channel_target(self._target)
        except OSError as error:
            _log.warning("no address is known", target=self._target, cause=str(error))
            # The first name alone: its channel looks it up again by itself, and calls say that it is unavailable.
            resolved = self._resolved or parse_targets(self._target)[0]
        else:
            self._resolved_at = time.monotonic()
        if resolved != self._resolved:
            self._resolved, self._version = resolved, -1

    async def _renew(self) -> grpc.aio.Channel:
        channel = self._channel
        if channel is None or self.is_outdated:
            self._version = self._peers.version
            channel = self._channel = self._peers.open(self._resolved, tls_name=self._tls_name)
            self._num_users[channel] = 0
            await self._close_unused()
        return channel

    async def _close_unused(self) -> None:
        unused = [channel for channel, num in self._num_users.items() if num == 0 and channel is not self._channel]
        for channel in unused:
            del self._num_users[channel]
        for channel in unused:
            await channel.close()
