"""A user that has nothing of ours but this repository can build the contract."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import google.rpc  # a namespace package: no __file__
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).parents[1]
THIRD_PARTY = ROOT / "proto" / "third_party"
WHEEL = Path(next(iter(google.rpc.__path__))).parents[1]
# The wheel names its file otherwise than the descriptor pool does.
RENAMED = {"google/longrunning/operations.proto": "google/longrunning/operations_proto.proto"}


def buf(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    assert program is not None
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("where", [(), ("proto",)])
def test_buf_builds_the_contract_without_a_network(where: tuple[str, ...], tmp_path: Path) -> None:
    image = tmp_path / "image.binpb"

    result = buf("build", *where, "--as-file-descriptor-set", "-o", str(image))

    assert result.returncode == 0, result.stderr
    files = {file.name: file for file in FileDescriptorSet.FromString(image.read_bytes()).file}
    services = {
        service.name for name, file in files.items() if name.startswith("loraplex/") for service in file.service
    }
    assert services == {"GatewayService", "FleetService", "EngineService", "AdapterStoreService", "ExternalScaler"}
    assert "google/longrunning/operations.proto" in files


def test_buf_lints_our_protos_and_would_find_fault(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "proto", tmp_path / "proto", ignore=shutil.ignore_patterns("gen"))
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    assert (good := buf("lint", cwd=tmp_path)).returncode == 0, good.stdout

    with (tmp_path / "proto/loraplex/v1/adapter.proto").open("a") as proto:
        proto.write("message lowercase {}\n")

    assert "lowercase" in buf("lint", cwd=tmp_path).stdout


def test_the_google_protos_beside_ours_are_those_of_the_pinned_wheel() -> None:
    kept = sorted(path.relative_to(THIRD_PARTY).as_posix() for path in THIRD_PARTY.rglob("*.proto"))

    assert kept
    differing = [n for n in kept if (THIRD_PARTY / n).read_bytes() != (WHEEL / RENAMED.get(n, n)).read_bytes()]
    assert not differing
