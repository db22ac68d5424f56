"""Mutual TLS, keys and roles on every hop: it serves, it leaks no secret, and nothing outlives its right."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import httpx
import pytest
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, engine_pb2, engine_pb2_grpc
from loraplex_common import healthcheck
from loraplex_common.errors import NoEngineError, RequestLostError, RoleForbiddenError, StreamInterruptedError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.kept_status import KeptStatus
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_common.tls_files import TlsFiles
from support.certificates import write
from support.sealed_stack import GATEWAY_LINE, SealedStack, sealed_stack
from support.waiting import eventually_sync

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_client import Client, Completion

__all__ = ["sealed_stack"]


def complete(client: Client, adapter: str | None = None, num_tokens: int = 8) -> Completion:
    return client.generate_once(
        prompt_token_ids=[5, 6, 7], adapter=adapter, max_new_tokens=num_tokens, ignore_eos=True, temperature=0
    )


def generate(client: Client, num_tokens: int = 8) -> list[int]:
    return list(complete(client, num_tokens=num_tokens).token_ids)


@pytest.fixture
def admin(sealed_stack: SealedStack) -> Iterator[Client]:
    with sealed_stack.client("admin") as client:
        yield client


def test_tokens_and_adapters_pass_through_every_hop(sealed_stack: SealedStack, admin: Client) -> None:
    imported = admin.adapters.import_directory("tiny-a", sealed_stack.import_root / "tiny-a")
    with sealed_stack.client("acme") as tenant:
        answer = complete(tenant, "tiny-a")

    assert len(answer.token_ids) == 8
    assert answer.started.adapter_revision == imported.revision.digest
    assert "attached to adapter store" in sealed_stack.engine.log()


def test_no_command_line_and_no_log_shows_a_secret(sealed_stack: SealedStack, admin: Client) -> None:
    generate(admin)
    lines = {entry: _read(entry / "cmdline") for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    ours = [*(process.pid for process in sealed_stack.processes), sealed_stack.valkey.pid]

    assert all(lines[Path(f"/proc/{pid}")] for pid in ours)
    logs = "".join(process.log() for process in sealed_stack.processes) + sealed_stack.valkey.log_path.read_text()
    for whose, secret in sealed_stack.secrets.items():
        assert not [line for line in lines.values() if secret in line], whose
        assert secret not in logs, whose


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""


@pytest.mark.parametrize("what", ["session", "drain", "download"])
async def test_who_has_no_part_in_it_gets_nowhere(sealed_stack: SealedStack, what: str) -> None:
    tenant = {"tls_ca": sealed_stack.authority.ca, "api_key": sealed_stack.secrets["acme"]}
    theirs = sealed_stack.authority.issue("acme-laptop")
    with_certificate = {**tenant, "tls_cert": theirs.cert, "tls_key": theirs.key}
    target = sealed_stack.store.grpc if what == "download" else sealed_stack.engine.grpc

    with pytest.raises(grpc.aio.AioRpcError) as plain:
        await call(what, target)
    with pytest.raises(grpc.aio.AioRpcError) as forbidden:
        await call(what, target, **with_certificate)

    assert plain.value.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(error_from_rpc(forbidden.value), RoleForbiddenError)
    with pytest.raises(grpc.aio.AioRpcError) as without:
        await call(what, target, **tenant)
    assert without.value.code() is grpc.StatusCode.UNAVAILABLE


async def call(what: str, target: str, **options: object) -> None:
    async with open_channel(target, **options) as channel:  # type: ignore[arg-type]
        if what == "download":
            store = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
            await store.DownloadAdapter(adapter_store_pb2.DownloadAdapterRequest(revision="ab" * 32), timeout=20).read()
            return
        engine = engine_pb2_grpc.EngineServiceStub(channel)
        if what == "drain":
            await engine.Drain(engine_pb2.DrainRequest(), timeout=20)
            return
        session = engine.Session(timeout=20)
        kept = KeptStatus(session)
        try:
            with contextlib.suppress(asyncio.InvalidStateError):  # refused before there was anything to send it over
                await session.write(engine_pb2.SessionRequest(hello=engine_pb2.SessionRequest.Hello(gateway_id="me")))
            await session.read()
        except grpc.aio.AioRpcError as error:
            raise kept.behind(error) from None


def test_every_service_takes_its_rotated_certificate_in_and_no_request_fails(sealed_stack: SealedStack) -> None:
    logs = {process: len(process.log()) for process in sealed_stack.processes}
    for name in ("gateway", "engine-1", "store"):
        sealed_stack.authority.issue(name)
    with sealed_stack.client("acme") as client:

        def are_read() -> bool:
            generate(client)
            _open_connections(sealed_stack)  # which is when a server looks
            return all("changed files were read again" in process.log()[at:] for process, at in logs.items())

        eventually_sync(are_read, what="certificates read again")


def _open_connections(stack: SealedStack) -> None:
    mine = stack.authority.issue("probe")
    tls = TlsFiles(ca=stack.authority.ca, cert=mine.cert, key=mine.key)
    for process in stack.processes:
        assert healthcheck.check(process.grpc, "liveness", tls=tls) is None


def test_a_gateway_that_is_not_let_in_any_more_loses_its_engine_and_gets_it_back(sealed_stack: SealedStack) -> None:
    with sealed_stack.client("acme") as client:
        generate(client)

        write(sealed_stack.keys, "\n".join(line for line in sealed_stack.lines() if line != GATEWAY_LINE))
        eventually_sync(lambda: not can_generate(client), what="the session ended")
        log = sealed_stack.gateway.log()
        write(sealed_stack.keys, "\n".join(sealed_stack.lines()))

        eventually_sync(lambda: can_generate(client), what="the session is back")
        assert "UNAUTHENTICATED" in log


def can_generate(client: Client) -> bool:
    try:
        generate(client, num_tokens=1)
    except (NoEngineError, RequestLostError, StreamInterruptedError):
        return False
    return True


def test_a_stream_of_a_tenant_whose_key_is_removed_ends_and_the_others_go_on(sealed_stack: SealedStack) -> None:
    url = f"https://{sealed_stack.gateway.addresses['http']}/v1/completions"
    body = {"model": sealed_stack.model.name, "prompt": "x", "max_tokens": 480, "stream": True, "ignore_eos": True}
    keys = {who: {"Authorization": f"Bearer {sealed_stack.secrets[who]}"} for who in ("acme", "admin")}
    trust = ssl.create_default_context(cafile=str(sealed_stack.authority.ca))
    with httpx.Client(verify=trust, timeout=30) as http:
        with http.stream("POST", url, json=body, headers=keys["acme"]) as mine, contextlib.ExitStack() as held:
            lines = mine.iter_lines()
            next(lines)
            # A small model may end before the gateway looks at its keys again: the engine stands still meanwhile.
            held.enter_context(sealed_stack.engine.stopped())
            without = [line for line in sealed_stack.lines() if sealed_stack.secrets["acme"] not in line]
            write(sealed_stack.keys, "\n".join(without))
            rest = list(lines)
        assert http.post(url, json={**body, "stream": False, "max_tokens": 2}, headers=keys["admin"]).status_code == 200
        assert http.post(url, json=body, headers=keys["acme"]).status_code == 401
        write(sealed_stack.keys, "\n".join(sealed_stack.lines()))

    assert any('"UNAUTHENTICATED"' in line for line in rest), rest[-3:]
    assert [line for line in rest if line][-1] == "data: [DONE]"
