"""Requests that wait in silence behind each proxy, for longer than proxies wait by default, on channels as clients open them.

``python -m support.proxy_waits --seconds 310`` (a part of ``make campaign``) waits behind each proxy at once, with its file of
deploy/proxies. The longest default is Envoy's, five minutes. Clients and gateways ping each other every 30 s meanwhile; a gateway
or a proxy that takes offence ends the connection, so that there is a second one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
from loraplex.v1 import gateway_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from loraplex_common.valkey import EmbeddedValkey
from support.gateway_rig import MODEL_NAME, running_gateway
from support.proxied_gateways import NUM_TOKENS, backends, long_text, read
from support.proxies import KINDS, running_proxy
from support.tcp_relay import TcpRelay
from support.waiting import eventually

if TYPE_CHECKING:
    from support.gateway_rig import Rig

PING: Final = b"\x00\x00\x08\x06\x00"
"""Length, type and flags of HTTP/2's ping; an answer has another flag."""
PING_EVERY_S: Final = 30.0
BODY: Final[dict[str, Any]] = {"model": MODEL_NAME, "prompt": "x", "max_tokens": NUM_TOKENS}


@dataclass
class Wait:
    """The result of one wait.

    Attributes:
        behind: The proxy, or ``none``.
        waited_s: Silence before the first token.
        num_tokens: Tokens that came then, over gRPC.
        http_status: Status of a request over HTTP that waited as long.
        num_connections: Connections of the channel.
        num_pings: Pings on it, of either side.
    """

    behind: str
    waited_s: float = 0.0
    num_tokens: int = 0
    http_status: int = 0
    num_connections: int = 0
    num_pings: int = 0
    wrong: list[str] = field(default_factory=list)

    def count(self, data: bytes) -> None:
        """Take bytes of the channel."""
        self.num_pings += data.count(PING)

    def judge(self, seconds: float) -> None:
        """Note what is not as it should be."""
        if (self.num_tokens, self.http_status) != (NUM_TOKENS, 200):
            self.wrong.append(f"{self.num_tokens} tokens, status {self.http_status}")
        if self.num_connections != 1:
            self.wrong.append(f"{self.num_connections} connections")
        if self.num_pings < seconds // PING_EVERY_S:
            self.wrong.append(f"{self.num_pings} pings")


async def _wait(rig: Rig, targets: tuple[str, str], wait: Wait, are_under_way: asyncio.Barrier) -> None:
    async with (
        TcpRelay(targets[0], watch=wait.count) as relay,
        open_channel(relay.target) as channel,
        httpx.AsyncClient(base_url=targets[1], timeout=None) as http,
    ):
        tokens = asyncio.create_task(read(gateway_pb2_grpc.GatewayServiceStub(channel).Generate(long_text())))
        answer = asyncio.create_task(http.post("/v1/completions", json=BODY))
        began_at = time.monotonic()
        await are_under_way.wait()
        done = await asyncio.gather(tokens, answer, return_exceptions=True)
        wait.waited_s, wait.num_connections = round(time.monotonic() - began_at, 1), relay.num_connections
    for each in done:
        if isinstance(each, BaseException):
            wait.wrong.append(f"{type(each).__name__}: {each}")
        elif isinstance(each, httpx.Response):
            wait.http_status = each.status_code
        else:
            wait.num_tokens = len(each)


async def run_waits(directory: Path, valkey_url: str, *, seconds: float) -> list[Wait]:
    """Wait behind each proxy, and behind none, at once; each result has what was wrong."""
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(running_gateway(valkey_url))
        rig.engine.hold_at = 0
        targets = [(backends([rig])[0].grpc, rig.http)]
        for kind in KINDS:
            proxy = await stack.enter_async_context(running_proxy(kind, directory, backends([rig, rig])))
            targets.append((proxy.grpc, proxy.http))
        waits, are_under_way = [Wait(kind) for kind in ("none", *KINDS)], asyncio.Barrier(len(targets) + 1)
        pairs = zip(targets, waits, strict=True)
        tasks = [asyncio.create_task(_wait(rig, target, wait, are_under_way)) for target, wait in pairs]
        await are_under_way.wait()
        await eventually(lambda: len(rig.engine.submits) == 2 * len(waits))
        await asyncio.sleep(seconds)  # the claim is about time passing
        rig.engine.release()
        await asyncio.gather(*tasks)
    for wait in waits:
        wait.judge(seconds)
    return waits


def main() -> None:
    """Run the waits and print their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=310.0)
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with (
        tempfile.TemporaryDirectory(prefix="loraplex-waits-") as name,
        EmbeddedValkey(Path(name) / "valkey", max_memory_bytes=2**28) as valkey,
    ):
        waits = asyncio.run(run_waits(Path(name), valkey.url, seconds=options.seconds))
    text = json.dumps({"commit": commit, "waits": [asdict(wait) for wait in waits]}, indent=2)
    print(text)
    if options.results is not None:
        (options.results / f"proxy-waits_{commit[:12]}_{options.seconds:g}.json").write_text(text + "\n")
    sys.exit(any(wait.wrong for wait in waits))


if __name__ == "__main__":
    main()
