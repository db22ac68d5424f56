"""What a gateway costs on its own, and what identity and quotas add: engines are doubles, so nothing is computed.

Usage: ``python benchmarks/gateway.py [--streams 256] [--tokens 400] [--clients 4] [--rounds 3] [--out FILE]``

Every part is a process of its own: Valkey, engine doubles that give each running request a token per step as fast as
they are read, one gateway, and clients. Three modes are run in turn, `rounds` times: *open* (no call is asked for
credentials), *mtls* (mutual TLS and keys on every hop, API keys for clients) and *mtls+quotas* (besides, every limit of
a quota on a tenant that never reaches it). Per mode: tokens and messages per second of all streams together, what the
gateway computes per message, and the time from a request to its first token while few requests run. With eight cores or
more the gateway has two of its own. Every second round runs the modes backwards, and each round is compared with
itself, since a shared machine changes its pace within minutes. The exit code is 0 if, by the medians over rounds, a
message of the first mode costs the gateway at least 0.95 of one of the last, and the first token comes at most 1 ms
later.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_bench.rounds import paired, spread

if TYPE_CHECKING:
    from collections.abc import Iterator

MODES = ("open", "mtls", "mtls+quotas")
LEAST_THROUGHPUT = 0.95
MOST_ADDED_MS = 1.0
NUM_ENGINES = 2
MIN_CORES_TO_SHARE_OUT = 8
GATEWAY_CORES = 2
FIRST_TOKEN_STREAMS = 2
FIRST_TOKEN_REQUESTS = 150
QUOTAS = """[default]
requests_per_minute = 100000000
tokens_per_minute = 100000000000
max_concurrent_requests = 100000
"""


@dataclass
class Times:
    """What the clients of one run saw.

    Attributes:
        num_tokens: Tokens of all streams.
        num_messages: Messages that they came in: tokens that wait for a reader come together.
        wall_s: From the first request to the last token, by the clock of the client that took longest.
        first_token_ms: From each request to its first token, with few requests under way.
    """

    num_tokens: int = 0
    num_messages: int = 0
    wall_s: float = 0.0
    first_token_ms: list[float] = field(default_factory=list)


# --- the parts, each in a process of its own ---


async def run_engine(arguments: argparse.Namespace) -> None:
    """Be an engine without a model until killed."""
    from loraplex.v1 import engine_pb2_grpc
    from loraplex_common import valkey
    from loraplex_common.auth import Authenticator
    from loraplex_common.base_model import load_base_model
    from loraplex_common.grpc_server import GrpcServer, ServerConfig
    from support.engine_double import EngineDouble, servicer_of
    from support.gateway_rig import letters

    double = EngineDouble(base=load_base_model(Path(arguments.model)), reply=letters, max_model_len=100_000)
    config, authenticator = ServerConfig(), Authenticator()
    if arguments.credentials:
        own = arguments.credentials / "engine"
        config = ServerConfig(tls_cert=own / "tls.crt", tls_key=own / "tls.key", tls_client_ca=own / "ca.crt")
        authenticator = Authenticator.from_file(own / "api-keys")
    server = GrpcServer(config, authenticator=authenticator)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer_of(double), server.server)
    double.port = await server.start()
    client = valkey.connect(os.environ["LORAPLEX_GATEWAY_REDIS_URL"])
    while True:
        await double.register(client)
        await asyncio.sleep(10)


async def run_client(arguments: argparse.Namespace) -> None:
    """Run streams against the gateway and print what they saw as JSON."""
    from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
    from loraplex_common.grpc_channel import open_channel

    own = arguments.credentials / "tenant" if arguments.credentials else None
    channel = open_channel(
        arguments.target,
        tls_ca=own / "ca.crt" if own else None,
        api_key=(own / "api-key").read_text().strip() if own else None,
    )
    stub = gateway_pb2_grpc.GatewayServiceStub(channel)

    times = Times()

    async def stream(num_tokens: int) -> float:
        stopping = gateway_pb2.StoppingParams(max_new_tokens=num_tokens, ignore_eos=True)
        request = gateway_pb2.GenerateRequest(text="The quick brown fox", stopping=stopping)
        started, first_s, count = time.perf_counter(), 0.0, 0
        async for response in stub.Generate(request, timeout=600):
            if response.WhichOneof("event") == "chunk":
                first_s = first_s or time.perf_counter() - started
                count += len(response.chunk.token_ids)
                times.num_messages += 1
        assert count == num_tokens, f"{count} tokens came of {num_tokens}"
        times.num_tokens += count
        return first_s

    await stream(4)
    times.num_tokens = times.num_messages = 0
    if arguments.first_token:
        for _ in range(FIRST_TOKEN_REQUESTS):
            firsts = await asyncio.gather(*[stream(4) for _ in range(FIRST_TOKEN_STREAMS)])
            times.first_token_ms += [1000 * first_s for first_s in firsts]
    else:
        started = time.perf_counter()
        await asyncio.gather(*[stream(arguments.tokens) for _ in range(arguments.streams)])
        times.wall_s = time.perf_counter() - started
    await channel.close()
    print(json.dumps(asdict(times)))


# --- one mode ---


class Part:
    """A child process, ended with its owner's block.

    Attributes:
        addresses: Kind of port -> address, of a service that says when it is ready.
    """

    def __init__(self, *command: str, awaits_ready: bool = False) -> None:
        self._process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) >= MIN_CORES_TO_SHARE_OUT:
            own = cores[:GATEWAY_CORES] if awaits_ready else cores[GATEWAY_CORES:]
            os.sched_setaffinity(self._process.pid, own)
        self.addresses: dict[str, str] = {}
        if awaits_ready:
            assert self._process.stdout is not None
            ready = next((line for line in self._process.stdout if line.startswith("ready: ")), None)
            if ready is None:
                raise SystemExit(f"{' '.join(command[:3])} ended before it was ready")
            self.addresses = dict(word.split("=", 1) for word in ready.split()[1:])

    def output(self) -> str:
        """Return what it prints until its end."""
        text, _ = self._process.communicate()
        if self._process.returncode:
            raise SystemExit(f"a client ended with {self._process.returncode}")
        return text

    def cpu_s(self) -> float:
        """Return how long it has computed."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running_gateway(mode: str, folder: Path) -> Iterator[tuple[Part, list[str]]]:
    """Run a gateway and its engines; yields it and what clients need to be told."""
    from loraplex_common.valkey import EmbeddedValkey
    from support.gateway_rig import model_directory

    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(EmbeddedValkey(folder / "valkey"))
        os.environ["LORAPLEX_GATEWAY_REDIS_URL"] = valkey.url  # it has the password, so no command line shows it
        where = ["--model", str(model_directory())]
        credentials, asks = credentials_of(mode, folder)
        for _ in range(NUM_ENGINES):
            stack.callback(Part(__file__, "engine", *where, *credentials).close)
        ports = ("--port", "0", "--http-port", "0", "--metrics-port", "0", "--log-level", "warning")
        gateway = Part("-m", "loraplex_gateway", *where, *ports, *asks, awaits_ready=True)
        stack.callback(gateway.close)
        yield gateway, ["--target", gateway.addresses["grpc"], *credentials]


def credentials_of(mode: str, folder: Path) -> tuple[list[str], list[str]]:
    """Return what engines and clients are told of credentials, and what the gateway is."""
    from loraplex_client.credentials.folder import CredentialsFolder, Plan

    if mode == "open":
        return [], []
    made = folder / "credentials"
    if not made.exists():
        CredentialsFolder(made).make(Plan())
    own = made / "gateway"
    files = {
        "--tls-cert": own / "tls.crt",
        "--tls-key": own / "tls.key",
        "--api-keys-file": own / "api-keys",
        "--peer-tls-ca": own / "ca.crt",
        "--peer-tls-cert": own / "tls.crt",
        "--peer-tls-key": own / "tls.key",
        "--peer-api-key-file": own / "api-key",
    }
    if mode == "mtls+quotas":
        files["--quotas-file"] = folder / "quotas.toml"
        files["--quotas-file"].write_text(QUOTAS)
    return ["--credentials", str(made)], [word for flag, path in files.items() for word in (flag, str(path))]


def measure(gateway: Part, told: list[str], arguments: argparse.Namespace) -> dict[str, float]:
    """Return what one gateway's clients saw in one round, and what the gateway computed."""
    share = ["--streams", str(arguments.streams // arguments.clients), "--tokens", str(arguments.tokens)]
    before_s = gateway.cpu_s()
    first = Part(__file__, "client", *told, *share, "--first-token").output()
    cpu_of_requests_s, before_s = gateway.cpu_s() - before_s, gateway.cpu_s()
    clients = [Part(__file__, "client", *told, *share) for _ in range(arguments.clients)]
    times = [Times(**json.loads(client.output())) for client in clients]
    cpu_s, wall_s = gateway.cpu_s() - before_s, max(each.wall_s for each in times)
    num_messages = sum(each.num_messages for each in times)
    return {
        "tokens_per_s": sum(each.num_tokens for each in times) / wall_s,
        "messages_per_s": num_messages / wall_s,
        "cpu_us_per_message": 1e6 * cpu_s / num_messages,
        "cpu_us_per_request": 1e6 * cpu_of_requests_s / (FIRST_TOKEN_STREAMS * FIRST_TOKEN_REQUESTS),
        "first_token_ms": statistics.median(Times(**json.loads(first)).first_token_ms),
    }


def compare(arguments: argparse.Namespace) -> int:
    """Run all modes in turn and print a line each; return the exit code."""
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in arguments.modes}
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name, contextlib.ExitStack() as stack:
        stacks = {}
        for number, mode in enumerate(arguments.modes):
            (folder := Path(name, str(number))).mkdir()
            stacks[mode] = stack.enter_context(running_gateway(mode, folder))
        for number in range(arguments.rounds):
            for mode in arguments.modes[:: -1 if number % 2 else 1]:
                runs[mode].append(measure(*stacks[mode], arguments))
                print(
                    f"{mode:<12} " + "  ".join(f"{key} {value:,.2f}" for key, value in runs[mode][-1].items()),
                    flush=True,
                )
    medians = {
        mode: {key: statistics.median(run[key] for run in each) for key in each[0]} for mode, each in runs.items()
    }
    shares, added_ms = paired(runs[arguments.modes[0]], runs[arguments.modes[-1]])
    share, added = statistics.median(shares), statistics.median(added_ms)
    is_good = share >= LEAST_THROUGHPUT and added <= MOST_ADDED_MS
    low, high = spread(shares)
    print(f"throughput with all on {share:.3f} of open ({low:.3f} to {high:.3f})")
    low, high = spread(added_ms)
    print(f"first token {added:+.2f} ms ({low:+.2f} to {high:+.2f}): {'good' if is_good else 'TOO SLOW'}")
    if arguments.out:
        what = {"streams": arguments.streams, "tokens": arguments.tokens, "clients": arguments.clients}
        result = {"commit": arguments.commit, "cores": os.cpu_count(), **what, "medians": medians}
        result |= {"throughput_shares": shares, "added_first_token_ms": added_ms, "runs": runs}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if is_good else 1


def main() -> int:
    """Parse, run, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", nargs="?", choices=["compare", "engine", "client"], default="compare", help=argparse.SUPPRESS
    )
    for name, default in (("--streams", 256), ("--tokens", 400), ("--clients", 4), ("--rounds", 3)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="run in turn (default: all)")
    parser.add_argument("--out", type=Path, help="file of the results, JSON")
    parser.add_argument("--commit", default="", help="written into the results")
    for name in ("--target", "--model"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--credentials", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first-token", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "compare":
        return compare(arguments)
    asyncio.run(run_engine(arguments) if arguments.part == "engine" else run_client(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
