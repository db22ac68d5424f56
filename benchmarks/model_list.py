"""What GET /v1/models costs a gateway that knows very many adapters, and what a change of one of them costs.

Usage: ``python benchmarks/model_list.py [--names 100000] [--calls 20]``

A gateway in this process with one engine double and a real Valkey; the client, which reads the body and no more, is
another process. A tenth of the adapters has a second label, a twentieth is restricted. Printed: the body's size, how
long a call takes, what it computes, how long the event loop is held up at most, and what changes cost.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from loraplex_common.alias_feed import AdapterEntry
from loraplex_common.valkey import EmbeddedValkey
from support.gateway_rig import DIGEST, OTHER_DIGEST, Rig, running_gateway

CHANGES = 1000
CLIENT = """
import socket, sys, time
host, port, path, calls = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for _ in range(calls):
    with socket.create_connection((host, port)) as connection:
        began, size = time.perf_counter(), 0
        connection.sendall(f"GET {path} HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n".encode())
        while part := connection.recv(1 << 20):
            size += len(part)
        print(size, time.perf_counter() - began, flush=True)
"""


def entry(name: str, number: int, fingerprint: str, *, is_moved: bool = False) -> AdapterEntry:
    """Return an adapter."""
    labels = {"latest": OTHER_DIGEST if is_moved else DIGEST}
    return AdapterEntry(
        name=name,
        labels=labels if number % 10 else {**labels, "prod": OTHER_DIGEST},
        base_fingerprints={DIGEST: fingerprint, OTHER_DIGEST: fingerprint},
        allowed_tenants=frozenset() if number % 20 else frozenset({f"tenant-{number % 50}"}),
    )


async def watch_loop(late_s: list[float]) -> None:
    """Note for ever how much later than it should this task runs."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        late_s.append(time.perf_counter() - began - 0.001)


async def measure_calls(rig: Rig, path: str, num_calls: int) -> None:
    """Call a path from another process and print what it costs."""
    late_s: list[float] = []
    watch = asyncio.create_task(watch_loop(late_s))
    computed_s = time.process_time()
    command = [sys.executable, "-c", CLIENT, "127.0.0.1", str(rig.app.http_port), path, str(num_calls)]
    client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await client.communicate()
    computed_s = time.process_time() - computed_s
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch
    calls = [line.split() for line in output.decode().splitlines()]
    seconds = sorted(float(call[1]) for call in calls)
    print(
        f"{path}: {int(calls[0][0]):,} bytes; {statistics.median(seconds) * 1e3:.1f} ms (best {seconds[0] * 1e3:.1f}), "
        f"of which {computed_s / num_calls * 1e3:.1f} ms computed; loop late by at most {max(late_s) * 1e3:.1f} ms"
    )


async def measure(valkey_url: str, num_names: int, num_calls: int) -> None:
    """Measure and print."""
    async with running_gateway(valkey_url) as rig:
        fingerprint = rig.app.catalog.models[0].fingerprint
        names = [f"team-{number % 977}/adapter-{number:06}" for number in range(num_names)]
        rig.app.names.replace_all(entry(name, number, fingerprint) for number, name in enumerate(names))
        await asyncio.sleep(3.0)  # the pieces are made in the background
        for path in ("/v1/models", "/v1/models?limit=100", f"/v1/models?limit=100&after={names[num_names // 2]}"):
            await measure_calls(rig, path, num_calls)
        began = time.process_time()
        for number in range(0, num_names, max(1, num_names // CHANGES)):
            rig.app.names.update([entry(names[number], number, fingerprint, is_moved=True)])
        print(f"a moved label: {(time.process_time() - began) / CHANGES * 1e6:.0f} us")
        began = time.process_time()
        for number in range(CHANGES):
            rig.app.names.update([entry(f"new/{number}", number, fingerprint)])
        print(f"a new name: {(time.process_time() - began) / CHANGES * 1e6:.0f} us")
        await asyncio.sleep(3.0)
        rig.app.names.update([entry(names[7], 7, fingerprint)])
        await measure_calls(rig, "/v1/models?limit=1", 1)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=100_000)
    parser.add_argument("--calls", type=int, default=20)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        valkey = EmbeddedValkey(Path(folder))
        valkey.start()
        try:
            asyncio.run(measure(valkey.url, flags.names, flags.calls))
        finally:
            valkey.close()


if __name__ == "__main__":
    main()
