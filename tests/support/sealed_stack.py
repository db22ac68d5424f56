"""A whole stack with credentials on every hop: mutual TLS and roles between services, password and TLS to Valkey."""

from __future__ import annotations

import secrets
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex_client import Client
from loraplex_common.errors import NoEngineError
from loraplex_common.valkey import EmbeddedValkey
from support.certificates import TestAuthority, write
from support.processes import ServiceProcess
from support.tls_proxy import tls_proxy_thread
from support.waiting import eventually_sync

if TYPE_CHECKING:
    from collections.abc import Iterator

GATEWAY_LINE = "cn=gateway gateway gateway"
FREE_PORTS = ("--port", "0")


@dataclass(kw_only=True, slots=True)
class SealedStack:
    """Processes of one stack and their credentials.

    Attributes:
        keys: The keys file of all servers.
        secrets: Every secret, by its owner.
    """

    authority: TestAuthority
    keys: Path
    import_root: Path
    valkey: EmbeddedValkey
    valkey_url: str
    secrets: dict[str, str]
    model: Path
    folder: Path
    store: ServiceProcess
    engine: ServiceProcess
    gateway: ServiceProcess

    def client(self, who: str) -> Client:
        """Return a client that sends the key of ``admin`` or ``acme``."""
        mine = self.authority.issue("people")
        return Client(
            self.gateway.grpc,
            store_target=self.store.grpc,
            tls_ca=self.authority.ca,
            tls_cert=mine.cert,
            tls_key=mine.key,
            api_key=self.secrets[who],
        )

    def lines(self) -> list[str]:
        """Return the keys file's text with every service and client that should be let in."""
        users = [f"{self.secrets['admin']} ops admin", f"{self.secrets['acme']} acme"]
        return [*users, f"{self.secrets['engine']} engine-1 engine", GATEWAY_LINE]

    @property
    def processes(self) -> tuple[ServiceProcess, ...]:
        """The processes in the order in which they are ended."""
        return (self.gateway, self.engine, self.store)


def _flags(folder: Path, authority: TestAuthority, name: str) -> tuple[str, ...]:
    cert = authority.issue(name)
    pair = (str(cert.cert), str(cert.key))
    own = ("--tls-cert", pair[0], "--tls-key", pair[1], "--api-keys-file", str(folder / "keys"))
    peer = ("--peer-tls-cert", pair[0], "--peer-tls-key", pair[1], "--peer-tls-ca", str(authority.ca))
    return (*own, *peer)


@contextmanager
def running_sealed_stack(folder: Path, model: Path, import_root: Path) -> Iterator[SealedStack]:
    """Run a sealed stack that ends with the block."""
    authority = TestAuthority(folder / "pki")
    with ExitStack() as stack:
        valkey = stack.enter_context(EmbeddedValkey(folder / "valkey", max_memory_bytes=2**30))
        port = stack.enter_context(tls_proxy_thread(valkey.address, authority.issue("valkey"), authority.ca))
        sealed = SealedStack(
            authority=authority,
            keys=folder / "keys",
            import_root=import_root,
            valkey=valkey,
            valkey_url=f"rediss://127.0.0.1:{port}/0",
            secrets={who: secrets.token_hex(16) for who in ("admin", "acme", "engine")},
            model=model,
            folder=folder,
            store=None,  # type: ignore[arg-type]  # below
            engine=None,  # type: ignore[arg-type]
            gateway=None,  # type: ignore[arg-type]
        )
        sealed.secrets["valkey"] = valkey.password_path.read_text().strip()
        write(sealed.keys, "\n".join(sealed.lines()))
        write(folder / "engine-key", sealed.secrets["engine"])
        try:
            _start(sealed)
            yield sealed
        except BaseException:
            for process in sealed.processes:
                if process is not None:
                    print(process.log_path, process.log()[-3000:])
                    process.kill()
            raise
        troubles = [process.log()[-4000:] for process in sealed.processes if process.stop() != 0]
        assert not troubles, "\n".join(troubles)


def _start(sealed: SealedStack) -> None:
    ca, folder = str(sealed.authority.ca), sealed.folder
    client_ca = ("--tls-client-ca", ca)
    sealed.store = _spawn(
        sealed,
        "loraplex_adapter_store",
        "store",
        *FREE_PORTS,
        "--metrics-port",
        "0",
        "--import-root",
        str(sealed.import_root),
        *client_ca,
    )
    peers = ("--store-target", sealed.store.grpc, "--store-tls-name", "store")
    sizes = ("--pool-bytes", "8MiB", "--arena-bytes", "8MiB", "--num-threads", "1")
    key = ("--peer-api-key-file", str(folder / "engine-key"))
    sealed.engine = _spawn(
        sealed, "loraplex_engine", "engine-1", *FREE_PORTS, "--metrics-port", "0", *sizes, *peers, *key, *client_ca
    )
    names = ("--engine-tls-name", "engine-1")
    sealed.gateway = _spawn(
        sealed, "loraplex_gateway", "gateway", *FREE_PORTS, "--http-port", "0", "--metrics-port", "0", *peers, *names
    )
    with sealed.client("acme") as client:
        eventually_sync(lambda: _generates(client), what="the engine found")


def _generates(client: Client) -> bool:
    try:
        client.generate_once(prompt_token_ids=[5], max_new_tokens=1)
    except NoEngineError:
        return False
    return True


def _spawn(sealed: SealedStack, module: str, name: str, *flags: str) -> ServiceProcess:
    valkey = ("--redis-url", sealed.valkey_url, "--redis-password-file", str(sealed.valkey.password_path))
    trust = ("--redis-tls-ca", str(sealed.authority.ca), "--drain-settle-s", "0", "--model", str(sealed.model))
    identity = _flags(sealed.folder, sealed.authority, name)
    return ServiceProcess(module, [*valkey, *trust, *identity, *flags], log_dir=sealed.folder).wait_ready()


@pytest.fixture(scope="module")
def sealed_stack(tiny_world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SealedStack]:
    """A sealed stack; a test that takes a credential away gives it back."""
    with running_sealed_stack(tmp_path_factory.mktemp("sealed"), *tiny_world) as stack:
        yield stack
