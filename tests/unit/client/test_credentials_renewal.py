"""The renewal of credentials: no caller is refused for a moment, wherever it is cut short."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import re
import shutil
from typing import TYPE_CHECKING

import pytest
from loraplex_client.credentials.certificates import is_signed_by, read_bundle
from loraplex_client.credentials.errors import CredentialsError
from loraplex_client.credentials.folder import CredentialsFolder, Plan
from loraplex_client.credentials.parties import PARTIES
from loraplex_client.credentials.private_files import write_private
from loraplex_common.auth import Authenticator, Role
from loraplex_common.errors import UnauthenticatedError
from support.made_credentials import HOLDERS, content, folder, key_of, needs_openssl, verifies

if TYPE_CHECKING:
    from pathlib import Path


@needs_openssl
def test_what_was_issued_before_a_renewal_and_after_it_get_on_until_the_old_is_dropped(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan(hosts={"engine": ("gpu-1",)}))
    shutil.copytree(made.path, tmp_path / "old")
    old, new = tmp_path / "old" / "engine", made.path / "engine"

    made.make(Plan(renews=True))

    assert verifies(old / "tls.crt", new / "ca.crt")
    assert verifies(new / "tls.crt", new / "ca.crt", "-verify_hostname", "gpu-1")
    assert not verifies(new / "tls.crt", old / "ca.crt")  # a new authority: the key of the old one is gone
    keys = {name for name in content(made.path) if name.endswith(("api-key", "api-keys", "password", "acl"))}
    assert all((tmp_path / "old" / name).read_bytes() == (made.path / name).read_bytes() for name in keys)
    made.make(Plan(drops_old=True))
    assert not verifies(old / "tls.crt", new / "ca.crt")
    assert verifies(new / "tls.crt", new / "ca.crt")


def test_everybody_trusts_the_new_authority_before_it_certifies_anybody(tmp_path: Path) -> None:
    seen: list[dict[str, bytes]] = []
    made = CredentialsFolder(tmp_path / "made", pause=lambda _seconds: seen.append(content(tmp_path / "made")))
    made.make(Plan())
    assert seen == []
    before = content(made.path)

    made.make(Plan(renews=True))

    (settled,) = seen
    assert {name for name in before if before[name] != settled[name]} == {f"{party.folder}/ca.crt" for party in PARTIES}
    after = content(made.path)
    assert {name for name in settled if settled[name] != after[name]} == {
        f"{party.folder}/{name}" for party in HOLDERS for name in ("tls.crt", "tls.key")
    }


@needs_openssl
def test_with_the_authoritys_key_kept_a_renewal_needs_no_new_authority(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan(keeps_ca_key=True))
    authority = (made.path / "engine" / "ca.crt").read_bytes()
    certificate = (made.path / "engine" / "tls.crt").read_bytes()

    made.make(Plan(renews=True, keeps_ca_key=True))

    assert (made.path / "engine" / "ca.crt").read_bytes() == authority
    assert (made.path / "engine" / "tls.crt").read_bytes() != certificate
    assert verifies(made.path / "engine" / "tls.crt", made.path / "gateway" / "ca.crt")
    made.make(Plan(renews=True))
    assert not (made.path / "ca" / "tls.key").exists()


def test_certificates_that_end_soon_are_renewed_when_asked_for(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan(lifetime=datetime.timedelta(days=20)))

    assert made.make(Plan(renews_within=datetime.timedelta(days=10))) == []
    assert made.make(Plan(renews_within=datetime.timedelta(days=30))) == ["issued new certificates"]

    assert made.ends > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=300)


def test_renewed_keys_are_good_beside_the_old_ones_until_those_are_dropped(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan())
    old, users = key_of(made.path, "engine"), (made.path / "valkey" / "users.acl").read_text()

    made.make(Plan(renews_keys=True))

    new = key_of(made.path, "engine")
    assert new != old
    known = Authenticator.from_file(made.path / "adapter_store" / "api-keys")
    assert [known.authenticate(key).role for key in (old, new)] == [Role.ENGINE, Role.ENGINE]
    passwords = set(re.findall(r"#[0-9a-f]{64}", users))
    assert passwords < set(re.findall(r"#[0-9a-f]{64}", (made.path / "valkey" / "users.acl").read_text()))
    made.make(Plan(drops_old=True))
    known = Authenticator.from_file(made.path / "adapter_store" / "api-keys")
    assert known.authenticate(new).role is Role.ENGINE
    with pytest.raises(UnauthenticatedError):
        known.authenticate(old)
    assert not passwords & set(re.findall(r"#[0-9a-f]{64}", (made.path / "valkey" / "users.acl").read_text()))


def test_a_first_making_that_was_cut_short_starts_over(tmp_path: Path) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    made = folder(tmp_path)
    made.issue = cut  # type: ignore[assignment,method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.make(Plan())

    assert folder(tmp_path).make(Plan()) == ["made certificates, API keys and Valkey passwords"]
    assert folder(tmp_path).make(Plan()) == []


def test_a_renewal_that_was_cut_short_between_key_and_certificate_is_done_again(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan())
    shutil.copy(made.path / "gateway" / "tls.key", made.path / "engine" / "tls.key")

    assert made.make(Plan()) == ["issued new certificates"]
    assert made.make(Plan()) == []


RENEWALS = {
    "certificates": Plan(renews=True),
    "certificates, authority kept": Plan(renews=True, keeps_ca_key=True),
    "keys": Plan(renews_keys=True),
    "all, old dropped": Plan(renews=True, renews_keys=True, drops_old=True),
}


@pytest.mark.parametrize("plan", RENEWALS.values(), ids=RENEWALS.keys())
def test_wherever_a_renewal_is_cut_short_everybody_gets_on_and_it_can_be_finished(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path).make(Plan())
    for num_written in itertools.count():
        made = CredentialsFolder(tmp_path / f"cut-{num_written}", pause=lambda _seconds: None)
        shutil.copytree(tmp_path / "made", made.path)
        with monkeypatch.context() as patched:
            if not is_cut_short(made, plan, num_written, patched):
                break
        assert strangers(made) == []
        made.make(plan)
        assert strangers(made) == []
        made.make(Plan(drops_old=True))
        assert strangers(made) == []
    assert num_written > 10


def test_what_an_unfinished_renewal_still_needs_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = folder(tmp_path)
    made.make(Plan())
    with monkeypatch.context() as patched:
        assert is_cut_short(made, Plan(renews=True), len(PARTIES) + 2, patched)  # the gateway's pair is there, no other
    before = content(made.path)

    with pytest.raises(CredentialsError, match="a renewal was cut short"):
        made.make(Plan(drops_old=True))

    assert content(made.path) == before
    assert made.make(Plan()) == ["issued new certificates"]
    made.make(Plan(drops_old=True))
    assert strangers(made) == []


def is_cut_short(made: CredentialsFolder, plan: Plan, num_written: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Carry a plan out until so many files are written; return whether it had more to do."""
    left = iter(range(num_written))

    def write(path: Path, data: bytes | str) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write_private(path, data)

    monkeypatch.setattr("loraplex_client.credentials.folder.write_private", write)
    monkeypatch.setattr("loraplex_client.credentials.secrets_book.write_private", write)
    try:
        made.make(plan)
    except KeyboardInterrupt:
        return True
    return False


def strangers(made: CredentialsFolder) -> list[str]:
    """Return the certificates, keys and passwords that a server which should take them does not."""
    found = []
    for holder in HOLDERS:
        for party in PARTIES:
            authorities = read_bundle(made.path / party.folder / "ca.crt")
            if not any(is_signed_by(made.path / holder.folder / "tls.crt", known) for known in authorities):
                found.append(f"certificate of {holder.folder} at {party.folder}")
    for server in (party for party in PARTIES if party.admits):
        known = Authenticator.from_file(made.path / server.folder / "api-keys")
        for caller in (party for party in PARTIES if party.role in server.admits):
            try:
                known.authenticate(key_of(made.path, caller.folder))
            except UnauthenticatedError:
                found.append(f"key of {caller.folder} at {server.folder}")
    users = (made.path / "valkey" / "users.acl").read_text()
    for user in (party for party in PARTIES if party.valkey_rights):
        password = (made.path / user.folder / "valkey-password").read_text().strip()
        if hashlib.sha256(password.encode()).hexdigest() not in users:
            found.append(f"password of {user.folder}")
    return found


@pytest.mark.parametrize("plan", [Plan(renews_keys=True), Plan(drops_old=True), Plan(renews_keys=True, drops_old=True)])
def test_renewed_keys_leave_peoples_own_lines_and_restore_no_removed_one(tmp_path: Path, plan: Plan) -> None:
    folder = CredentialsFolder(tmp_path, pause=lambda _s: None)
    folder.make(Plan())
    keys = tmp_path / "gateway" / "api-keys"
    made = keys.read_text().splitlines()
    (revoked,) = [line for line in made if line.endswith(" tenant tenant")]
    own = ["# our customers", "secret-of-acme acme group=shop", "cn=node-1 node-1"]
    keys.write_text("\n".join([line for line in made if line != revoked] + own) + "\n")

    folder.make(plan)

    lines = keys.read_text().splitlines()
    assert lines[-3:] == own
    assert revoked not in lines
    assert sum(line.startswith("# Who may call") for line in lines) == 1
    assert any(line.endswith(" admin admin") for line in lines)
