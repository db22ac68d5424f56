"""What a line of the keys file can say, and how a changed file takes effect."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from loraplex_common.auth import CHECK_EVERY_S, Authenticator, Certificate, Principal, Role
from loraplex_common.errors import UnauthenticatedError
from loraplex_common.keys_file import KeysFile, KeysFileError, parse_keys

if TYPE_CHECKING:
    from pathlib import Path


def who(line: str) -> Principal:
    (principal,) = parse_keys(line, "keys").values()
    return principal


@pytest.mark.parametrize(
    ("line", "principal"),
    [
        ("k acme", Principal(name="acme")),
        ("k acme tenant", Principal(name="acme")),
        ("k acme group=shop priority=high", Principal(name="acme", group="shop", highest_priority=3)),
        ("k acme priority=batch", Principal(name="acme", highest_priority=1)),
        ("k ops admin", Principal(name="ops", role=Role.ADMIN, highest_priority=3)),
        ("k ops admin priority=normal", Principal(name="ops", role=Role.ADMIN)),
        ("k gw-1 gateway", Principal(name="gw-1", role=Role.GATEWAY)),
        ("k e engine", Principal(name="e", role=Role.ENGINE)),
        ("k prometheus metrics", Principal(name="prometheus", role=Role.METRICS)),
        ("k admin", Principal(name="admin")),  # a tenant may be called so
    ],
)
def test_a_line_says_who_a_key_is_and_what_it_may(line: str, principal: Principal) -> None:
    assert who(line) == principal


@pytest.mark.parametrize(
    "line",
    [
        "k",
        "k acme root",
        "k acme tenant admin",
        "k acme group=",
        "k acme priority=urgent",
        "k acme priority=",
        "k acme limit=3",
        "k gw gateway priority=high",
        "k acme group=a group=b c",
        "k ac\u00e9me",
        f"k {'a' * 129}",
        "sha256:12 acme",
        "cn= acme",
        "san= acme",
        "CN=acme acme",
        "San=acme acme",
        f"SHA256:{'0' * 64} acme",
    ],
)
def test_a_line_that_says_anything_else_is_refused(line: str) -> None:
    with pytest.raises(KeysFileError, match="keys:1: "):
        parse_keys(line, "keys")


def test_a_mark_of_the_encoding_in_front_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("secret acme\n", encoding="utf-8-sig")

    assert Authenticator.from_file(path).authenticate("Bearer secret").name == "acme"


def test_two_spellings_of_one_key_are_one_key() -> None:
    digest = hashlib.sha256(b"secret").hexdigest()

    with pytest.raises(KeysFileError, match="keys:2: this key appears twice"):
        parse_keys(f"secret acme\nsha256:{digest} other\n", "keys")


def test_a_hashed_key_lets_in_its_secret_and_not_its_hash() -> None:
    line = f"sha256:{hashlib.sha256(b'secret').hexdigest()}"
    authenticator = Authenticator({line: Principal(name="acme")})

    assert authenticator.authenticate("Bearer secret").name == "acme"
    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate(f"Bearer {line}")


def test_a_certificate_is_known_by_any_of_its_names() -> None:
    authenticator = Authenticator({"san=spiffe://cluster/gateway": Principal(name="gw", role=Role.GATEWAY)})
    certificate = Certificate(common_name="x", alternative_names=("localhost", "spiffe://cluster/gateway"))

    assert authenticator.authenticate(None, certificate=certificate).role is Role.GATEWAY
    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate(None, certificate=Certificate(common_name="spiffe://cluster/gateway"))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_changed_file_takes_effect_and_a_broken_one_does_not(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text("k1 acme\n")
    authenticator = Authenticator(file=KeysFile(path), clock=clock)

    path.write_text("k2 acme\nk3 ops admin\n")
    clock.now += CHECK_EVERY_S
    assert authenticator.authenticate("Bearer k3").is_admin
    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate("Bearer k1")

    for broken in ("", "k4\n", None):
        path.unlink() if broken is None else path.write_text(broken)
        clock.now += CHECK_EVERY_S
        assert authenticator.authenticate("Bearer k2").name == "acme"
    path.write_text("k4 acme\n")
    clock.now += CHECK_EVERY_S
    assert authenticator.authenticate("Bearer k4").name == "acme"
