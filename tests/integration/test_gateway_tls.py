"""The gateway's HTTP port under TLS: certificates are rotated without ending a stream, and client certificates are asked for."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from loraplex_common import watched_files
from structlog.testing import capture_logs
from support.certificates import TestAuthority, write
from support.gateway_rig import running_gateway

if TYPE_CHECKING:
    from pathlib import Path

    from support.certificates import Issued


@pytest.fixture(autouse=True)
def _every_look_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY_S", 0.0)


def trusting(authority: TestAuthority, mine: Issued | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.ca))
    if mine is not None:
        context.load_cert_chain(mine.cert, mine.key)
    return context


async def version(url: str, trust: ssl.SSLContext) -> int:
    async with httpx.AsyncClient(verify=trust) as client:
        return (await client.get(f"{url}/version")).status_code


async def test_a_rotated_certificate_is_shown_to_new_connections_and_ends_no_stream(
    valkey_url: str, tmp_path: Path
) -> None:
    old, new = TestAuthority(tmp_path / "old"), TestAuthority(tmp_path / "new")
    cert = old.issue("gateway")
    options = {"tls_ca": old.ca}
    async with running_gateway(valkey_url, tls_cert=cert.cert, tls_key=cert.key, channel_options=options) as rig:
        url = rig.http.replace("http:", "https:")
        rig.engine.hold_at = 2
        body = {"model": "tiny", "prompt": "x", "max_tokens": 8, "stream": True}
        async with (
            httpx.AsyncClient(verify=trusting(old), timeout=30) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as answer,
        ):
            lines = answer.aiter_lines()
            await anext(lines)

            rotated = new.issue("gateway")
            write(cert.cert, rotated.cert.read_bytes())
            write(cert.key, rotated.key.read_bytes())

            assert await version(url, trusting(new)) == 200
            with pytest.raises(httpx.ConnectError):
                await version(url, trusting(old))
            rig.engine.release()
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"


async def test_a_broken_certificate_is_logged_and_the_old_one_stays_good(valkey_url: str, tmp_path: Path) -> None:
    authority = TestAuthority(tmp_path)
    cert = authority.issue("gateway")
    options = {"tls_ca": authority.ca}
    async with running_gateway(valkey_url, tls_cert=cert.cert, tls_key=cert.key, channel_options=options) as rig:
        url = rig.http.replace("http:", "https:")
        with capture_logs() as logs:
            write(cert.cert, "not a certificate")

            assert await version(url, trusting(authority)) == 200

        assert [log for log in logs if log["log_level"] == "error" and str(cert.cert) in log["cause"]]


async def test_an_authority_taken_away_lets_in_no_new_http_connection(valkey_url: str, tmp_path: Path) -> None:
    old, new = TestAuthority(tmp_path / "old"), TestAuthority(tmp_path / "new")
    cert, trusted = new.issue("gateway"), tmp_path / "trusted.pem"
    before, after = old.issue("laptop"), new.issue("laptop")
    write(trusted, old.ca.read_bytes() + new.ca.read_bytes())
    tls: dict[str, Any] = {"tls_cert": cert.cert, "tls_key": cert.key, "tls_client_ca": trusted}
    options = {"tls_ca": new.ca, "tls_cert": after.cert, "tls_key": after.key}
    async with running_gateway(valkey_url, **tls, channel_options=options) as rig:
        url = rig.http.replace("http:", "https:")
        resumed = trusting(new, before)
        assert await version(url, resumed) == 200
        with pytest.raises(httpx.TransportError):
            await version(url, trusting(new))

        write(trusted, new.ca.read_bytes())

        assert await version(url, trusting(new, after)) == 200
        with pytest.raises(httpx.TransportError):
            await version(url, resumed)


@pytest.mark.parametrize(
    ("host", "has_keys", "warns"), [("0.0.0.0", False, True), ("0.0.0.0", True, False), ("127.0.0.1", False, False)]
)
async def test_a_public_gateway_that_asks_nobody_says_so(
    valkey_url: str, tmp_path: Path, host: str, has_keys: bool, warns: bool
) -> None:
    (tmp_path / "keys").write_text("k acme")
    with capture_logs() as logs:
        async with running_gateway(valkey_url, host=host, api_keys_file=tmp_path / "keys" if has_keys else None):
            pass

    said = [log for log in logs if "everybody who reaches this gateway" in log["event"]]
    assert bool(said) is warns
