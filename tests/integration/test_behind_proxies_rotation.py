"""Gateways and proxies that do TLS: certificates, and their authority, are replaced under load, and no request notices."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common import watched_files
from support.gateway_rig import text_request
from support.proxied_gateways import NUM_TOKENS, long_text, read
from support.proxied_tls import TLS_FILES, Identities, Sealed, certificate_at, sealed_gateways
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

AGE_S = 0.5
NUM_CLIENTS = 4
NUM_ROTATIONS = 4
SHORT = gateway_pb2.StoppingParams(max_new_tokens=2)


@pytest.fixture(autouse=True)
def _every_look_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY_S", 0.0)


class Load:
    """Clients that dial, ask and dial again, and one stream that lasts."""

    def __init__(self, sealed: Sealed) -> None:
        self.num_served = 0
        self._sealed = sealed
        self._is_over = False

    async def run(self) -> None:
        """Ask until `end`; every failure is raised."""
        while not self._is_over:
            async with self._sealed.identities.channel(self._sealed.proxy.grpc) as channel:
                stub = gateway_pb2_grpc.GatewayServiceStub(channel)
                for _ in range(5):
                    assert len(await read(stub.Generate(text_request(stopping=SHORT), timeout=30))) == 2
                    self.num_served += 1

    async def some_more(self) -> None:
        """Return once each client may have dialled twice."""
        goal = self.num_served + 10 * NUM_CLIENTS
        await eventually(lambda: self.num_served >= goal, what="more requests served")

    def end(self) -> None:
        """Let the clients stop."""
        self._is_over = True


async def rotate_all(identities: Identities, load: Load, kind: str, sealed: Sealed) -> None:
    """Replace all certificates some times, by another authority's each time, and see each of them in use."""
    for number in range(NUM_ROTATIONS):
        identities.rotate(identities.authorities[(number + 1) % 2])
        sealed.proxy.read_again()
        shown = identities.shown_by("gateway" if kind == "haproxy" else "proxy")

        async def is_shown(shown: str = shown) -> bool:
            return await certificate_at(sealed.proxy.grpc) == shown

        await eventually(is_shown, what="the new certificate shown")
        await load.some_more()


@pytest.mark.parametrize("kind", TLS_FILES)
async def test_certificates_are_rotated_under_load_and_no_stream_fails(
    kind: str, valkey_url: str, tmp_path: Path
) -> None:
    async with sealed_gateways(kind, tmp_path, valkey_url, max_connection_age_s=AGE_S) as sealed:
        identities, load, engine = sealed.identities, Load(sealed), sealed.rigs[0].engine
        engine.hold_at = 2
        async with asyncio.TaskGroup() as group, identities.channel(sealed.proxy.grpc) as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            held = group.create_task(read(stub.Generate(long_text(), timeout=60)))
            for _ in range(NUM_CLIENTS):
                group.create_task(load.run())
            await load.some_more()

            await rotate_all(identities, load, kind, sealed)
            identities.trust_only(identities.authorities[0])  # that of the last rotation
            await load.some_more()

            load.end()
            engine.release()
            assert len(await held) == NUM_TOKENS


async def test_a_proxy_that_passes_tls_on_leaves_it_to_the_gateways_who_is_let_in(
    valkey_url: str, tmp_path: Path
) -> None:
    async with sealed_gateways("haproxy", tmp_path, valkey_url) as sealed:
        identities, target = sealed.identities, sealed.proxy.grpc
        identities.trust_only(identities.authorities[0])
        known = identities.channel(target)
        identities.rotate(identities.authorities[1], ["client"])

        async with known, identities.channel(target) as stranger:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read(gateway_pb2_grpc.GatewayServiceStub(stranger).Generate(text_request(), timeout=10))
            assert len(await read(gateway_pb2_grpc.GatewayServiceStub(known).Generate(long_text(), timeout=30))) > 0

        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert sum(len(rig.engine.submits) for rig in sealed.rigs[:1]) == 1
