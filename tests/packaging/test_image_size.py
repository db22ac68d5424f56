"""What the images of gateway and store add to their base: few enough megabytes, and all that the services import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
NO_INDEX = re.compile(r"error sending request|Failed to fetch|dns error|Could not connect", re.IGNORECASE)
MEGABYTE = 1_000_000
MAX_BYTES = {"adapter_store": 140 * MEGABYTE, "gateway": 120 * MEGABYTE}
"""Service -> what its environment may take. An image may take 250 MB. The gateway's base has about 125 MB, the store's about
105: the store's image leaves out the installers of its base."""
SIGNER = """
from loraplex_adapter_store.signatures.bundles import check_signer
from loraplex_adapter_store.signatures.trust import Signer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
key = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*form)
check_signer(Signer(name="release", public_key=key))
"""


@dataclass(frozen=True)
class Environment:
    """The folder that a service's image has at /opt/loraplex."""

    service: str
    folder: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run its Python, which sees nothing of this checkout."""
        return run(self.folder / "bin" / "python", "-P", *arguments, cwd=self.folder)


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=kept | {"SETUPTOOLS_SCM_PRETEND_VERSION": "0.1.0", "LORAPLEX_COMMIT": "0" * 12},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    if done.returncode and NO_INDEX.search(done.stderr):
        pytest.skip(f"no package index can be reached: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done


@pytest.fixture(scope="module", params=list(MAX_BYTES))
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Do what the first stage of a Dockerfile does: install the lock and the service's own wheel, and slim both."""
    service: str = request.param
    if shutil.which("strip") is None:
        pytest.skip("no strip on this machine: install binutils")
    stage = (ROOT / "services" / service / "Dockerfile").read_text().split("\nFROM ")[1]
    sources, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("image") / "environment"
    for line in re.findall(r"^COPY (?!deploy/locks)(.+) \S+$", stage, re.MULTILINE):
        for name in line.split():
            copy(ROOT / name, sources / name)
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=sources)
    # Copies, since stripping a link would change the installer's cache.
    install = ("-m", "uv", "pip", "install", "-q", "--system-certs", "--link-mode", "copy", "--no-deps")
    target = ("--python", folder / "bin" / "python")
    (lock,) = re.findall(r"deploy/locks/((?!build)\S+\.txt)", stage)
    run(sys.executable, *install, *target, "--require-hashes", "-r", ROOT / "deploy" / "locks" / lock, cwd=sources)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", sources / "wheel", cwd=sources)
    run(sys.executable, *install, *target, *(sources / "wheel").glob("*.whl"), cwd=sources)
    (modules,) = re.findall(r"deploy/slim\.sh /opt/loraplex (.+)$", stage, re.MULTILINE)
    run("sh", sources / "deploy" / "slim.sh", folder, *modules.split(), cwd=sources)
    return Environment(service, folder)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


def test_what_an_image_adds_to_its_base_does_not_grow_unseen(environment: Environment) -> None:
    sizes = {
        path.relative_to(environment.folder): path.lstat().st_size
        for path in environment.folder.rglob("*")
        if not path.is_dir()
    }

    largest = sorted(sizes.items(), key=lambda item: -item[1])[:15]
    assert sum(sizes.values()) < MAX_BYTES[environment.service], "\n".join(f"{size} {path}" for path, size in largest)


def test_nothing_that_a_service_starts_with_was_left_out(environment: Environment) -> None:
    done = environment.run("-m", f"loraplex_{environment.service}", "--help")

    assert "--redis-url" in done.stdout


def test_numpy_and_its_algebra_are_whole(environment: Environment) -> None:
    environment.run(
        "-c", "import numpy; a = numpy.ones((64, 64)); assert (a @ a == 64).all(); numpy.random.default_rng(0)"
    )


@pytest.mark.parametrize("environment", ["adapter_store"], indirect=True)
def test_the_store_checks_signatures_without_sigstores_client(environment: Environment) -> None:
    environment.run("-c", SIGNER)
    installed = {path.name for path in environment.folder.glob("lib/python3*/site-packages/*")}
    assert not installed & {"sigstore", "tuf", "rfc3161_client", "requests"}
