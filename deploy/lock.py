"""Writes the lock files that images are built from: every package with its version and the digests of its files.

    python deploy/lock.py [--check]

Versions are those of constraints.txt; what that does not name is resolved by uv. With ``--check`` nothing is asked of an
index: each lock is only compared with pyproject.toml and constraints.txt. `make lock` runs it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
LOCKS: Final = ROOT / "deploy" / "locks"
EXTRAS: Final = {
    "gateway": ("gateway", "tracing"),
    "adapter-store": ("adapter-store", "signatures", "tracing"),
    "engine": ("engine", "cuda", "tracing"),
    "tools": ("client", "convert", "credentials"),
    "serve": ("serve", "tracing"),
}
"""Lock -> the extras that it holds; ``engine-cpu`` and ``build`` are made from others."""
SIGSTORE_CLIENT: Final = (
    *(
        "asn1crypto",
        "charset-normalizer",
        "dnspython",
        "email-validator",
        "id",
        "markdown-it-py",
        "mdurl",
        "platformdirs",
    ),
    *("pygments", "pyjwt", "requests", "rfc3161-client", "rfc8785", "rich", "securesystemslib", "sigstore"),
    *("sigstore-rekor-types", "tuf", "urllib3"),
)
"""What only signatures of Sigstore's identities need, which the store does not check (``signatures/bundles.py``)."""
LEFT_OUT: Final = {
    "gateway": ("hf-xet", "markdown-it-py", "mdurl", "pygments", "rich", "shellingham", "typer"),
    "adapter-store": ("hf-xet", "shellingham", "typer", *SIGSTORE_CLIENT),
}
"""Lock -> packages that nothing in the image imports: faster downloads of weights, and the libraries of command lines."""
TORCH_CPU_SHA256: Final = "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
"""Digest of PyTorch's own CPU wheel for CPython 3.11 on Linux; it is in PyTorch's index, which PyPI does not copy."""
CUDA_ONLY: Final = re.compile(r"^(nvidia-|cuda-|triton==)")
"""Packages that torch's CPU wheel does not want."""


def entries(text: str) -> dict[str, str]:
    """Return name of a package -> its lines in a lock, digests included."""
    blocks = re.findall(r"^[A-Za-z0-9][^\n]*(?:\n +--hash[^\n]*)*\n", text, re.MULTILINE)
    return {re.split(r"[=\s;]", block)[0]: block for block in blocks}


def compile_lock(arguments: list[str], out: Path) -> None:
    """Have uv resolve and write one lock."""
    command = ["uv", "pip", "compile", "--quiet", "--system-certs", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-annotate", "--no-header", "--no-emit-index-url", "-c", "constraints.txt"]
    subprocess.run([sys.executable, "-m", *command, *arguments, "-o", str(out)], cwd=ROOT, check=True)


def cpu_only(engine: str) -> str:
    """Return the engine's lock for machines without a GPU: no CUDA, and torch's CPU wheel alone."""
    kept = {name: block for name, block in entries(engine).items() if not CUDA_ONLY.match(block)}
    version = re.match(r"torch==[\d.]+", kept["torch"])
    if version is None:
        raise ValueError(f"the engine's lock pins no version of torch: {kept['torch']}")
    kept["torch"] = f"{version[0]} \\\n    --hash=sha256:{TORCH_CPU_SHA256}\n"
    return "".join(kept.values())


def write() -> None:
    """Write all locks."""
    LOCKS.mkdir(exist_ok=True)
    for name, extras in EXTRAS.items():
        chosen = [word for extra in extras for word in ("--extra", extra)]
        unwanted = [word for package in LEFT_OUT.get(name, ()) for word in ("--no-emit-package", package)]
        compile_lock(["pyproject.toml", *chosen, *unwanted], LOCKS / f"{name}.txt")
    (LOCKS / "engine-cpu.txt").write_text(cpu_only((LOCKS / "engine.txt").read_text()))
    compile_lock(["deploy/locks/build.in"], LOCKS / "build.txt")
    compile_lock(["deploy/locks/demo-model.in", "--no-deps"], LOCKS / "demo-model.txt")


def problems() -> list[str]:
    """Return how locks differ from what pyproject.toml and constraints.txt ask for."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {_normal(name): version for name, version in pins.items() if not name.startswith("#")}
    found = []
    for lock in sorted(LOCKS.glob("*.txt")):
        locked = {_normal(name): block for name, block in entries(lock.read_text()).items()}
        for name, block in locked.items():
            version = re.match(r"[^=]+==([^\s;]+)", block)
            if "--hash=sha256:" not in block or version is None:
                found.append(f"{lock.name}: {name} has no digest")
            elif name in pinned and version[1] != pinned[name]:
                found.append(f"{lock.name}: {name} is {version[1]}, constraints.txt says {pinned[name]}")
        wanted = [*extras["dependencies"]] if lock.stem in EXTRAS else []
        for extra in EXTRAS.get(lock.stem, ()):
            wanted += extras["optional-dependencies"][extra]
        for requirement in wanted:
            name = _normal(re.split(r"[^\w.-]", requirement)[0])
            if name not in locked and name not in (*LEFT_OUT.get(lock.stem, ()), "loraplex"):
                found.append(f"{lock.name}: {name} is missing")
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """Write or check the locks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a lock is out of date")
    if not parser.parse_args().check:
        write()
    if found := problems():
        print("\n".join([*found, "run: make lock"]), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
