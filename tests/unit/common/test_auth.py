"""API keys and certificates become tenants; anything else is refused."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from loraplex_common.auth import (
    ANYBODY,
    Authenticator,
    Certificate,
    Principal,
    Role,
    acting_as,
    current_principal,
)
from loraplex_common.errors import UnauthenticatedError
from loraplex_common.keys_file import KeysFileError

if TYPE_CHECKING:
    from pathlib import Path


def write_keys(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys"
    path.write_text(text)
    return path


def test_a_keys_file_maps_keys_to_tenants(tmp_path: Path) -> None:
    path = write_keys(tmp_path, "# our keys\nk1 acme\n\n k2   ops admin  # on call\n")

    authenticator = Authenticator.from_file(path)

    assert authenticator.authenticate("Bearer k1") == Principal(name="acme")
    assert authenticator.authenticate("bearer k2") == Principal(name="ops", role=Role.ADMIN, highest_priority=3)
    assert not authenticator.is_open


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k1\n", r"keys:1: expected 'KEY NAME \[tenant\|admin"),
        ("k1 acme\nk2 ops root\n", r"keys:2: expected"),
        ("k1 acme\nk1 ops\n", r"keys:2: this key appears twice"),
        ("# nothing\n", "holds no keys"),
    ],
)
def test_a_malformed_keys_file_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(KeysFileError, match=message):
        Authenticator.from_file(write_keys(tmp_path, text))


def test_a_malformed_line_does_not_quote_the_key(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError) as caught:
        Authenticator.from_file(write_keys(tmp_path, "very-secret\n"))

    assert "very-secret" not in str(caught.value)


def test_a_missing_keys_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError, match="No such file"):
        Authenticator.from_file(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "header", [None, "", "k1", "Basic k1", "Bearer", "Bearer ", "Bearer k", "Bearer k11", "Bearer K1"]
)
def test_anything_but_a_known_key_is_refused(header: str | None) -> None:
    with pytest.raises(UnauthenticatedError):
        Authenticator({"k1": Principal(name="acme")}).authenticate(header)


def test_a_certificate_is_a_credential_only_through_its_own_entry() -> None:
    authenticator = Authenticator({"cn=node-1": Principal(name="acme")})

    assert authenticator.authenticate(None, certificate=Certificate(common_name="node-1")) == Principal(name="acme")
    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate(None, certificate=Certificate(common_name="node-2"))
    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate("Bearer cn=node-1")  # a name that any caller can know


def test_a_wrong_key_is_not_excused_by_a_known_certificate() -> None:
    authenticator = Authenticator({"cn=node-1": Principal(name="acme")})

    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate("Bearer wrong", certificate=Certificate(common_name="node-1"))


def test_without_keys_everybody_is_let_in() -> None:
    authenticator = Authenticator.from_file(None)

    assert authenticator.is_open
    assert authenticator.authenticate(None) == ANYBODY
    assert authenticator.authenticate(None, certificate=Certificate(common_name="node-1")).name == "node-1"


def test_the_tenant_is_per_task_and_ends_with_its_block() -> None:
    async def who(name: str) -> str:
        with acting_as(Principal(name=name)):
            await asyncio.sleep(0)
            return current_principal().name

    async def main() -> tuple[str, str]:
        first, second = await asyncio.gather(who("a"), who("b"))
        return first, second

    assert asyncio.run(main()) == ("a", "b")
    assert current_principal() == ANYBODY
