"""A base model by its name on the hub: fetched from a hub on loopback, by the command that users run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex_common.hub_base import HubBaseError, fetch_hub_base
from support.base_models import TinyBase, write_base_model
from support.hub_double import HubDouble, running_hub

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEVER = {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "original/model.safetensors": b"a second copy"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubDouble]:
    base = write_base_model(tmp_path / "written", TinyBase())
    files = {file.name: file.read_bytes() for file in base.iterdir() if file.is_file()}
    with running_hub(HubDouble("org/base", COMMIT, files | NEVER)) as running:
        yield running


def loraplex(home: Path, hub: HubDouble, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    unset = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = unset | {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"} | settings
    command = [sys.executable, "-m", "loraplex_client", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def names_in(directory: str) -> set[str]:
    return {entry.name for entry in os.scandir(directory) if not entry.name.startswith(".")}


def test_only_listed_files_are_fetched_the_commit_is_told_and_offline_the_cache_serves(
    hub: HubDouble, tmp_path: Path
) -> None:
    first = loraplex(tmp_path / "home", hub, "fetch-model", "org/base")
    hub.requests.clear()
    offline = loraplex(tmp_path / "home", hub, "fetch-model", "org/base", HF_HUB_OFFLINE="1")

    assert (first.returncode, f"org/base at commit {COMMIT}" in first.stderr) == (0, True), first.stderr
    directory = first.stdout.strip()
    assert names_in(directory) == set(hub.files) - set(NEVER)
    assert (offline.returncode, offline.stdout.strip(), hub.requests) == (0, directory, []), offline.stderr


def test_a_pinned_model_is_put_where_it_is_asked_for_with_a_token(hub: HubDouble, tmp_path: Path) -> None:
    hub.token = "secret"
    arguments = ("fetch-model", f"org/base@{COMMIT}", "--out", str(tmp_path / "out"))

    refused = loraplex(tmp_path / "home", hub, *arguments)
    fetched = loraplex(tmp_path / "home", hub, *arguments, HF_TOKEN="secret")

    assert refused.returncode == 1
    assert f"org/base@{COMMIT}: no such repository at {hub.url}; one that is private needs HF_TOKEN" in refused.stderr
    assert (fetched.returncode, fetched.stdout.strip()) == (0, str(tmp_path / "out")), fetched.stderr
    assert names_in(str(tmp_path / "out")) == set(hub.files) - set(NEVER)


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (("fetch-model", "org/other"), {}, "org/other: no such repository"),
        (("fetch-model", "org/base@" + "f" * 40), {}, "no such commit in this repository"),
        (("fetch-model", "org/base@main"), {}, "expected org/name, or org/name@COMMIT"),
        (
            ("fetch-model", "org/base"),
            {"HF_HUB_OFFLINE": "1"},
            r"HF_HUB_OFFLINE is set\), and .* has no whole copy .*; try again, set HF_ENDPOINT",
        ),
        (("fetch-model", "org/base"), {"HF_ENDPOINT": "http://127.0.0.1:1"}, "http://127.0.0.1:1 cannot be reached"),
        (("fetch-model", "org/base"), {"HF_ENDPOINT": "hub"}, "HF_ENDPOINT 'hub' is no address"),
        (("fetch-model", "org/a--b"), {}, "org/a--b: is no name that a repository of the hub can have"),
        (("fetch-model", "org/base"), {"HF_HOME": "/dev/null"}, "/dev/null.*: Not a directory; make the directory one"),
        (("serve", "--base-port", "0", "--model", "org/other"), {}, "org/other: no such repository"),
    ],
)
def test_what_cannot_be_fetched_is_refused_by_name_with_a_remedy(
    hub: HubDouble, tmp_path: Path, arguments: tuple[str, ...], settings: dict[str, str], said: str
) -> None:
    result = loraplex(tmp_path / "home", hub, *arguments, **settings)

    assert result.returncode == 1, result.stderr
    assert re.search(said, result.stderr)
    assert "Traceback" not in result.stderr


class GatedHub(HubDouble):
    """A hub whose repository needs terms to be accepted."""

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"{}"


def test_a_gated_repository_is_named_with_where_to_accept_its_terms(tmp_path: Path) -> None:
    with running_hub(GatedHub("org/base", COMMIT, {})) as hub:
        result = loraplex(tmp_path / "home", hub, "fetch-model", "org/base")

        assert f"org/base: is gated; accept its terms at {hub.url}/org/base and set HF_TOKEN" in result.stderr


class NamedHub(HubDouble):
    """A hub that names weights by their sha256, as it does all big files, and may send others."""

    sent: bytes | None = None

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        status, headers, data = super().answer(path, authorization)
        if not path.endswith("/model.safetensors"):
            return status, headers, data
        return status, headers | {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, self.sent or data

    def _tree(self) -> tuple[int, dict[str, str], bytes]:
        status, headers, data = super()._tree()
        files = json.loads(data)
        for file in files:
            if file["path"] == "model.safetensors":
                oid = hashlib.sha256(self.files[file["path"]]).hexdigest()
                file["lfs"] = {"oid": oid, "size": file["size"], "pointerSize": 100}
        return status, headers, json.dumps(files).encode()


@pytest.mark.parametrize("place", ["cache", "out"])
def test_weights_whose_bytes_changed_on_the_way_are_refused(hub: HubDouble, tmp_path: Path, place: str) -> None:
    named = NamedHub("org/base", COMMIT, hub.files)
    weights = hub.files["model.safetensors"]
    named.sent = weights[:-1] + bytes([weights[-1] ^ 1])
    arguments = ("fetch-model", f"org/base@{COMMIT}", *(() if place == "cache" else ("--out", str(tmp_path / "out"))))
    with running_hub(named):
        damaged = loraplex(tmp_path / "home", named, *arguments)
        found = re.search(r"(\S+) is not what the hub has; remove that file, and try again", damaged.stderr)
        assert (damaged.returncode, found is not None) == (1, True), damaged.stderr
        Path(found[1] if found else "").unlink()
        named.sent = None

        assert loraplex(tmp_path / "home", named, *arguments).returncode == 0


def test_a_directory_with_files_of_another_commit_is_refused(hub: HubDouble, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of another commit")

    result = loraplex(tmp_path / "home", hub, "fetch-model", f"org/base@{COMMIT}", "--out", str(out))

    assert result.returncode == 1
    assert f"{out} has model-00001-of-00002.safetensors, which this commit has not" in result.stderr


class FailingHub(HubDouble):
    """A hub that answers whatever is asked with one status."""

    status = 500

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        return self.status, {}, b"{}"


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "set HF_TOKEN to a token"), (403, "may not read"), (429, "too many requests: wait"), (500, "try again")],
)
def test_an_answer_that_is_a_failure_is_told_with_its_status_and_a_remedy(
    tmp_path: Path, status: int, remedy: str
) -> None:
    failing = FailingHub("org/base", COMMIT, {})
    failing.status = status
    with running_hub(failing) as hub:
        result = loraplex(tmp_path / "home", hub, "fetch-model", "org/base")

        assert result.returncode == 1
        assert f"org/base: {hub.url} answered {status}; " in result.stderr
        assert remedy in result.stderr


def test_a_full_disk_is_named_with_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_room)

    with pytest.raises(HubBaseError, match="org/base: the disk is full; free room, or set HF_HOME"):
        fetch_hub_base("org/base")


def test_a_repository_of_pickled_weights_only_is_refused(hub: HubDouble, tmp_path: Path) -> None:
    hub.files = {name: data for name, data in hub.files.items() if not name.endswith(".safetensors")}

    result = loraplex(tmp_path / "home", hub, "fetch-model", "org/base")

    assert (result.returncode, "pickled weights are not fetched" in result.stderr) == (1, True), result.stderr
