"""The maker of credentials: chains that openssl verifies, least rights, renewal that never refuses a caller."""

from __future__ import annotations

import datetime
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex_client._profiles import read_profile
from loraplex_client.credentials.errors import CredentialsError
from loraplex_client.credentials.folder import CredentialsFolder, Plan
from loraplex_common.auth import Authenticator, Role
from loraplex_common.errors import UnauthenticatedError
from support.made_credentials import HOLDERS, SERVERS, content, folder, key_of, needs_openssl, verifies

if TYPE_CHECKING:
    from pathlib import Path

    from support.cli_runner import Runner


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
    assert not (made.path / "ca").exists()  # no process can sign further certificates


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


def test_a_missing_file_is_named_and_nothing_is_made_in_its_place(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.make(Plan())
    (made.path / "engine" / "tls.key").unlink()
    before = content(made.path)

    with pytest.raises(CredentialsError, match=r"engine/tls\.key missing, the rest is there"):
        made.make(Plan(renews=True))

    assert content(made.path) == before


@pytest.mark.parametrize("host", ["höst", "", "a,b", "llm.example:8500", "https://llm", "-a", "a..b"])
def test_a_host_that_is_none_is_refused_by_name(host: str, tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match=f"'{host}' is neither an IP address nor a DNS name"):
        folder(tmp_path).make(Plan(hosts={"engine": (host,)}))


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
