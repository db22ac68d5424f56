"""Web pages read answers if their origin is allowed, and no page does by default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from support.gateway_rig import MODEL_NAME, make_config, running_gateway

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration
PAGE, OTHER = "https://chat.example:8443", "https://other.example"
ASK = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
ALLOWED = "access-control-allow-origin"


async def ask(url: str, origin: str, method: str = "OPTIONS", **more: Any) -> httpx.Response:
    headers = {"origin": origin, **(ASK if method == "OPTIONS" else {})}
    async with httpx.AsyncClient(base_url=url, headers=headers) as http:
        return await http.request(method, more.pop("path", "/v1/completions"), **more)


async def test_no_page_is_let_in_by_default(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        answers = [await ask(rig.http, PAGE), await ask(rig.http, PAGE, "GET", path="/v1/models")]

        assert [answer.status_code for answer in answers] == [405, 200]
        assert not any(header.startswith("access-control") for answer in answers for header in answer.headers)


async def test_pages_of_an_allowed_origin_read_answers_streams_and_errors(valkey_url: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("key-me me\n")
    async with running_gateway(
        valkey_url, cors_allow_origin=(PAGE, "http://localhost:3000"), api_keys_file=tmp_path / "keys"
    ) as rig:
        question = await ask(rig.http, PAGE)
        refusal = await ask(rig.http, PAGE, "POST", json={})
        body = {"model": MODEL_NAME, "prompt": "x", "max_tokens": 3, "stream": True}
        async with httpx.AsyncClient(
            base_url=rig.http, headers={"authorization": "Bearer key-me", "origin": PAGE}
        ) as http:
            stream = await http.post("/v1/completions", json=body)

        assert (question.status_code, question.content) == (204, b"")
        assert question.headers["access-control-allow-headers"] == ASK["access-control-request-headers"]
        assert "POST" in question.headers["access-control-allow-methods"]
        assert [answer.status_code for answer in (refusal, stream)] == [401, 200]
        assert {answer.headers[ALLOWED] for answer in (question, refusal, stream)} == {PAGE}
        assert {answer.headers["vary"] for answer in (question, refusal, stream)} == {"Origin"}
        assert stream.headers["access-control-expose-headers"] == "*"
        assert stream.text.endswith("data: [DONE]\n\n")
        assert "access-control-allow-credentials" not in stream.headers
        for answer in (await ask(rig.http, OTHER), await ask(rig.http, OTHER, "GET", path="/health")):
            assert ALLOWED not in answer.headers


async def test_every_origin_may_be_allowed(valkey_url: str) -> None:
    async with running_gateway(valkey_url, cors_allow_origin=("*",)) as rig:
        assert (await ask(rig.http, OTHER, "GET", path="/v1/models")).headers[ALLOWED] == "*"
        odd = await ask(rig.http, OTHER, headers={**ASK, "access-control-request-headers": "a b\x01"})
        assert "access-control-allow-headers" not in odd.headers


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "https://*.example", ""])
def test_what_is_no_origin_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ValueError, match="--cors-allow-origin"):
        make_config("redis://127.0.0.1", cors_allow_origin=(origin,))
