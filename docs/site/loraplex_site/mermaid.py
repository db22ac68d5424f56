"""The library that draws the diagrams, fetched once from npm, so that the site asks no server for it.

    python -m loraplex_site.mermaid

Where there is no npm, or npm reaches no registry, this says so and succeeds: diagrams then stay as the text they are
written in, which the site shows as code.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from loraplex_site.repository import ROOT

VERSION: Final = "11.17.2"
SHA256: Final = "581ed7d74bd9048d0e3a91363927d72ef22942d7722546b27f7cc29e35390eb8"
"""Digest of the one file that is taken out of npm's package."""
MEMBER: Final = "package/dist/mermaid.min.js"
SCRIPT: Final = ROOT / ".cache" / "docs" / f"mermaid-{VERSION}.min.js"


def script() -> Path | None:
    """Return the library's file, ``None`` if it was not fetched.

    Raises:
        ValueError: If the file is not the one that was pinned.
    """
    if not SCRIPT.exists():
        return None
    require_pinned(SCRIPT.read_bytes())
    return SCRIPT


def require_pinned(content: bytes) -> None:
    """Raise unless some bytes are the pinned library.

    Raises:
        ValueError: If they are not.
    """
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(f"mermaid {VERSION} has the digest {digest}, not {SHA256}: remove {SCRIPT.parent}")


def fetch() -> str | None:
    """Fetch the library unless it is there; return why it could not be had.

    Raises:
        ValueError: If npm gives another file than the one that was pinned.
    """
    if script() is not None:
        return None
    npm = shutil.which("npm")
    if npm is None:
        return "there is no npm"
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", f"mermaid@{VERSION}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"npm pack says: {done.stderr.strip() or done.returncode}"
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:
            member = package.extractfile(MEMBER)
            if member is None:
                raise ValueError(f"mermaid {VERSION} has no {MEMBER}")
            content = member.read()
    require_pinned(content)
    SCRIPT.parent.mkdir(parents=True, exist_ok=True)
    SCRIPT.write_bytes(content)
    return None


if __name__ == "__main__":
    if (problem := fetch()) is not None:
        print(f"diagrams stay as text: {problem}", file=sys.stderr)
