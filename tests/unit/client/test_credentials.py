"""The maker of credentials: chains that openssl verifies, least rights, renewal in which nobody is refused for a moment."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex_client._profiles import read_profile
from loraplex_client.credentials.certificates import is_signed_by, read_bundle
from loraplex_client.credentials.errors import CredentialsError
from loraplex_client.credentials.folder import CredentialsFolder, Plan
from loraplex_client.credentials.parties import PARTIES
from loraplex_client.credentials.private_files import write_private
from loraplex_common.auth import Authenticator, Role
from loraplex_common.errors import UnauthenticatedError

if TYPE_CHECKING:
    from pathlib import Path

    from support.cli_runner import Runner

HOLDERS = [party for party in PARTIES if party.has_certificate]
SERVERS = [party for party in PARTIES if party.admits]
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


def folder(path: Path) -> CredentialsFolder:
    return CredentialsFolder(path / "made", pause=lambda _seconds: None)


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def verifies(certificate: Path, ca: Path, *options: str) -> bool:
    command = ["openssl", "verify", "-x509_strict", "-CAfile", str(ca), *options, str(certificate)]
    return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0


def key_of(made: Path, holder: str) -> str:
    return f"Bearer {(made / holder / 'api-key').read_text().strip()}"


def test_targets_given_later_are_written_and_what_is_not_given_stays(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan(gateway_target="gw:1", store_target="store:1"))
    before = content(made.path)

    moved = made.make(Plan(gateway_target="gw:2"))
    profile = read_profile(made.path / "admin" / "profile.json")
    again = made.make(Plan(gateway_target="gw:2"))

    assert (profile.gateway.target, profile.store.target) == ("gw:2", "store:1")
    assert profile.store.tls_ca == made.path / "admin" / "ca.crt"
    assert {name for name, data in content(made.path).items() if data != before[name]} == {"admin/profile.json"}
    assert len(moved) == 1
    assert again == []


@needs_openssl
def test_every_certificate_is_good_for_what_its_holder_does_and_nothing_else(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan(hosts={"engine": ("gpu-1.example", "10.0.0.7")}))

    for party in HOLDERS:
        certificate, ca = (made.path / party.folder / name for name in ("tls.crt", "ca.crt"))
        assert verifies(certificate, ca, "-purpose", "sslserver") == bool(party.tls_name), party
        assert verifies(certificate, ca, "-purpose", "sslclient"), party
        for other in HOLDERS:
            if other.tls_name:
                named = verifies(certificate, ca, "-verify_hostname", other.tls_name)
                assert named == (other is party), (party, other)
    engine, ca = made.path / "engine" / "tls.crt", made.path / "engine" / "ca.crt"
    assert verifies(engine, ca, "-verify_hostname", "gpu-1.example")
    assert verifies(engine, ca, "-verify_ip", "10.0.0.7")
    assert not verifies(engine, ca, "-verify_hostname", "gateway.loraplex.internal")


def test_nobody_else_may_read_any_of_it(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.path.mkdir(mode=0o755)  # as a mounted volume may be

    made.make(Plan())

    files = [made.path, *made.path.rglob("*")]
    assert {oct(file.stat().st_mode & 0o777) for file in files if file.is_file()} == {"0o600"}
    assert {oct(file.stat().st_mode & 0o777) for file in files if file.is_dir()} == {"0o700"}


def test_a_folder_holds_its_holders_secrets_and_of_the_others_nothing(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan())
    names = ("api-key", "valkey-password", "tls.key")
    secret = {file: file.read_bytes().strip() for name in names for file in made.path.glob(f"*/{name}")}
    assert len(secret) == 5 + 5 + 5  # callers, users of Valkey, certificates

    for file, value in secret.items():
        holders = {other.parts[-2] for other in made.path.rglob("*") if other.is_file() and value in other.read_bytes()}
        assert holders == {file.parts[-2]}
    assert not (made.path / "ca").exists()  # nobody can sign further certificates


def test_each_server_knows_the_callers_it_serves_and_no_others(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan())
    found: dict[str, dict[str, Role]] = {}

    for server in SERVERS:
        known = Authenticator.from_file(made.path / server.folder / "api-keys")
        found[server.folder] = {}
        for caller in ("gateway", "engine", "admin", "metrics", "tenant"):
            try:
                found[server.folder][caller] = known.authenticate(key_of(made.path, caller)).role
            except UnauthenticatedError:
                continue

    people = {"admin": Role.ADMIN, "metrics": Role.METRICS}
    assert found == {
        "gateway": {"tenant": Role.TENANT, **people},
        "engine": {"gateway": Role.GATEWAY, **people},
        "adapter_store": {"gateway": Role.GATEWAY, "engine": Role.ENGINE, **people},
    }


def test_made_again_it_stays_as_it_is(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan(hosts={"engine": ("a",)}))
    before = content(made.path)

    assert made.make(Plan(hosts={"engine": ("a",)}, renews_within=datetime.timedelta(days=30))) == []
    with pytest.raises(CredentialsError, match=r"engine/tls\.crt does not name b: issue it anew with --renew"):
        made.make(Plan(hosts={"engine": ("b",)}))

    assert content(made.path) == before


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
    """Return whose certificate, key or password somebody does not take who should."""
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


def test_a_missing_file_is_named_and_nothing_is_made_in_its_place(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan())
    (made.path / "engine" / "tls.key").unlink()
    before = content(made.path)

    with pytest.raises(CredentialsError, match=r"engine/tls\.key missing, the rest is there"):
        made.make(Plan(renews=True))

    assert content(made.path) == before


def test_a_host_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="'höst' is neither an IP address nor a DNS name"):
        folder(tmp_path).make(Plan(hosts={"engine": ("höst",)}))


def test_the_command_makes_shows_and_refuses(loraplex: Runner, tmp_path: Path) -> None:
    made = str(tmp_path / "made")

    first = loraplex("credentials", "make", made, "--engine-host", "gpu-1", "--days", "90")
    again = loraplex("credentials", "make", made)
    other = loraplex("credentials", "make", made, "--engine-host", "gpu-2")
    shown = loraplex("credentials", "show", made)

    assert (first.code, again.code, other.code, shown.code) == (0, 0, 1, 0)
    assert "made certificates" in first.out
    assert "nothing to do" in again.out
    assert "engine/tls.crt does not name gpu-2" in other.err
    assert "gpu-1" in shown.out
    secrets = [file.read_text().strip() for name in ("api-key", "valkey-password") for file in tmp_path.rglob(name)]
    assert not any(secret in result.out + result.err for secret in secrets for result in (first, again, other, shown))


@pytest.mark.parametrize("arguments", [("--help",), ("credentials", "--help"), ("serve", "--help")])
def test_the_command_line_works_without_the_library_that_signs(arguments: tuple[str, ...]) -> None:
    without = "import sys; sys.modules['cryptography'] = None; from loraplex_client.cli import main; main()"

    done = subprocess.run([sys.executable, "-c", without, *arguments], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_making_without_that_library_names_what_to_install(tmp_path: Path) -> None:
    without = "import sys; sys.modules['cryptography'] = None; from loraplex_client.cli import main; main()"
    command = [sys.executable, "-c", without, "credentials", "make", str(tmp_path / "made")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "cryptography is not installed; pip install" in done.stderr


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


def test_two_processes_do_not_make_credentials_in_one_folder_at_once(tmp_path: Path) -> None:
    folder = CredentialsFolder(tmp_path)
    folder.make(Plan())
    refused: list[str] = []

    def pause(_s: float) -> None:
        with pytest.raises(CredentialsError) as caught:
            folder.make(Plan(drops_old=True))
        refused.append(str(caught.value))

    CredentialsFolder(tmp_path, pause=pause).make(Plan(renews_keys=True))

    assert refused
    assert "another process" in refused[0]
