"""Resume tokens are sealed: with keys that gateways share, through Valkey or a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_common import valkey
from loraplex_common.errors import ResumeInvalidError
from loraplex_gateway.resume.keys import (
    CHECK_FILE_S,
    VALKEY_KEY,
    ResumeKeyError,
    ResumeKeyFile,
    ResumeKeys,
)
from loraplex_gateway.resume.token import ResumePoint, seal, unseal

if TYPE_CHECKING:
    from pathlib import Path

KEY, OTHER = b"k" * 32, b"o" * 32
POINT = ResumePoint(
    request_id="0b6b1f0e-8c7e-4d5d-9a63-2f2f6a9c2f11",
    tenant="team",
    fingerprint="ab" * 32,
    adapter="org/name",
    revision="cd" * 32,
    seed=2**64 - 1,
    max_new_tokens=4096,
    request_digest=b"d" * 32,
    admitted_at=1.5,
    issued_at=2.5,
)


def cause_of(token: str, *keys: bytes) -> str:
    with pytest.raises(ResumeInvalidError) as caught:
        unseal(token, keys)
    return caught.value.metadata["cause"]


def test_a_token_says_what_was_sealed_and_fits_into_an_errors_metadata() -> None:
    token = seal(POINT, KEY)

    assert unseal(token, (OTHER, KEY)) == POINT
    assert len(token) < 600


@given(position=st.integers(0, 10_000), character=st.sampled_from("Aa0_-"), cut=st.integers(0, 10))
def test_no_character_of_a_token_can_be_changed(position: int, character: str, cut: int) -> None:
    token = seal(POINT, KEY)
    position %= len(token) - 1  # the very last character holds bits that stand for nothing
    changed = token[:position] + character + token[position + 1 :]

    if changed != token:
        assert cause_of(changed, KEY) == "forged"
    assert cause_of(token[: len(token) // 2 + cut], KEY) == "forged"
    assert cause_of(token, OTHER) == "forged"


@pytest.mark.parametrize("token", ["", "x", "no base64!", "\u00e9", "A" * 44, "A" * 100_000])
def test_what_is_no_token_is_refused(token: str) -> None:
    assert cause_of(token, KEY) == "forged"


async def test_gateways_agree_on_a_key_whoever_comes_first(valkey_url: str) -> None:
    client = valkey.connect(valkey_url)
    try:
        first, second, late = (ResumeKeys(valkey=client) for _ in range(3))
        early = seal(POINT, second.sealing)  # before it has agreed with another gateway
        assert await first.agree()
        assert await second.agree()

        assert first.sealing == second.sealing != late.sealing
        assert unseal(early, second.opening) == POINT

        await client.delete(VALKEY_KEY)  # Valkey has lost it: a gateway that comes now makes another one
        token = seal(POINT, first.sealing)
        for keys in (late, first, second):
            assert await keys.agree()
        assert first.sealing == second.sealing == late.sealing
        assert unseal(token, second.opening) == POINT
    finally:
        await client.aclose()


async def test_without_valkey_a_gateway_has_a_key_of_its_own() -> None:
    client = valkey.connect("unix:///nowhere")
    keys = ResumeKeys(valkey=client)

    assert not await keys.agree()
    assert unseal(seal(POINT, keys.sealing), keys.opening) == POINT
    await client.aclose()


def test_a_key_file_is_read_again_and_its_old_keys_open(tmp_path: Path) -> None:
    path, now = tmp_path / "keys", [0.0]
    path.write_text("a" * 32 + "\n")
    keys = ResumeKeys(file=ResumeKeyFile(path, clock=lambda: now[0]))
    token = seal(POINT, keys.sealing)

    for text in ("b" * 40 + "\n" + "a" * 32 + "\n", "short\n"):  # the second cannot be used, and changes nothing
        path.write_text(text)
        os.utime(path, ns=(0, len(text)))
        now[0] += 2 * CHECK_FILE_S
        assert seal(POINT, keys.sealing) != token
        assert unseal(token, keys.opening) == POINT

    path.write_text("b" * 40)
    now[0] += 2 * CHECK_FILE_S
    assert cause_of(token, *keys.opening) == "forged"


@pytest.mark.parametrize("text", [None, "", "short"])
def test_a_key_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)

    with pytest.raises(ResumeKeyError, match=str(path)) as caught:
        ResumeKeyFile(path)
    assert "short" not in str(caught.value)
