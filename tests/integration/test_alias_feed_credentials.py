"""Following names at a store that does not let us in yet: new credentials are taken up without a restart."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from loraplex_adapter_store.service import running_store
from loraplex_common import watched_files
from loraplex_common.alias_feed import AdapterEntry, AliasFeed
from loraplex_common.peers import PeerChannel, PeerIdentity, Peers
from loraplex_common.secret import Secret
from support.certificates import TestAuthority, write
from support.store_rig import store_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


class Table:
    """Notes that it was filled."""

    def __init__(self) -> None:
        self.is_filled = asyncio.Event()

    def replacing(self, entries: Iterable[AdapterEntry]) -> Iterator[None]:
        self.is_filled.set()
        yield

    def update(self, entries: Iterable[AdapterEntry]) -> None:
        return None


@pytest.mark.parametrize("what", ["authority", "key"])
async def test_a_feed_that_was_refused_goes_on_with_new_credentials(
    valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY_S", 0.0)
    ours, theirs = TestAuthority(tmp_path / "ours"), TestAuthority(tmp_path / "theirs")
    cert, trusted, key = ours.issue("store"), tmp_path / "trusted.pem", tmp_path / "key"
    write(tmp_path / "keys", "right gateway gateway")
    write(trusted, (theirs if what == "authority" else ours).ca.read_bytes())
    write(key, "wrong" if what == "key" else "right")
    config = store_config(valkey_url, tls_cert=cert.cert, tls_key=cert.key, api_keys_file=tmp_path / "keys")
    async with running_store(config) as store:
        peers = Peers(PeerIdentity(tls_ca=trusted, api_key=Secret.from_file(key)))
        channel, table = PeerChannel(peers, f"127.0.0.1:{store.grpc_port}"), Table()
        feed = asyncio.create_task(AliasFeed(channel, [table]).run())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(table.is_filled.wait(), 1.0)

        write(trusted, ours.ca.read_bytes())
        write(key, "right")

        await asyncio.wait_for(table.is_filled.wait(), 20.0)
        feed.cancel()
        await asyncio.gather(feed, return_exceptions=True)
        await channel.close()
