"""A real registry of the OCI distribution protocol on loopback; `tests/tools/ensure-docker-registry.sh` provides it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httpx2
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TOOLS: Final = Path(__file__).parents[2] / ".cache" / "docker-registry"
MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX: Final = "application/vnd.oci.image.index.v1+json"
_LISTENING: Final = re.compile(rb"listening on (127\.0\.0\.1:\d+)")


class OciRegistry:
    """A registry that artifacts are pushed to, in the form that ORAS gives them.

    Attributes:
        url: Its address.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def push(
        self, repo: str, files: Mapping[str, bytes], *, annotation: str = "org.opencontainers.image.title", **layer: str
    ) -> str:
        """Push an artifact of one layer a file; return its manifest's digest."""
        layers = [
            self.blob(repo, data) | {"mediaType": "application/octet-stream", "annotations": {annotation: name}} | layer
            for name, data in files.items()
        ]
        config = self.blob(repo, b"{}") | {"mediaType": "application/vnd.oci.empty.v1+json"}
        return self.manifest(repo, {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers})

    def blob(self, repo: str, data: bytes) -> dict[str, Any]:
        """Push a blob; return its digest and size."""
        digest = _digest(data)
        started = httpx2.post(f"{self.url}/v2/{repo}/blobs/uploads/").raise_for_status()
        location = started.headers["location"]
        mark = "&" if urlsplit(location).query else "?"
        httpx2.put(f"{location}{mark}digest={digest}", content=data).raise_for_status()
        return {"digest": digest, "size": len(data)}

    def manifest(self, repo: str, fields: Mapping[str, Any]) -> str:
        """Push a manifest; return its digest."""
        data = json.dumps(fields).encode()
        url = f"{self.url}/v2/{repo}/manifests/{_digest(data)}"
        httpx2.put(url, content=data, headers={"content-type": fields["mediaType"]}).raise_for_status()
        return _digest(data)


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@contextmanager
def running_registry(directory: Path) -> Iterator[OciRegistry]:
    """Run an empty registry inside the block, or skip the test where there is none."""
    program = shutil.which("docker-registry") or shutil.which("docker-registry", path=str(TOOLS))
    if program is None:
        pytest.skip("no docker-registry on this machine: run tests/tools/ensure-docker-registry.sh")
    config = {
        "version": "0.1",
        "log": {"level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(directory / "data")}},
        "http": {"addr": "127.0.0.1:0"},
    }
    path = directory / "config.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    process = subprocess.Popen([program, "serve", str(path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        assert process.stderr is not None
        address = next((match[1] for line in process.stderr if (match := _LISTENING.search(line))), None)
        assert address is not None, "the registry has ended"
        with subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL):  # a full pipe would stop it
            try:
                yield OciRegistry(f"http://{address.decode()}")
            finally:
                process.terminate()
                process.wait(10)
    finally:
        process.kill()
        process.wait()
