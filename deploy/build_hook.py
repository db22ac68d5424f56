"""Writes into each wheel and source archive which commit it was built from; hatchling calls it, as pyproject.toml says."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface[Any]):
    """Adds the file that `loraplex_common.version` reads. An editable install has none: its sources know their commit."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the commit to what is built.

        Args:
            version: ``editable`` for an editable install.
            build_data: What hatchling is going to build; a file is added to its ``force_include``.
        """
        if version == "editable":
            return
        with tempfile.NamedTemporaryFile("w", prefix="loraplex-commit-", delete=False) as file:
            file.write(self._commit() + "\n")
        self._file = file.name
        target = "COMMIT" if self.target_name == "sdist" else "loraplex_common/COMMIT"
        build_data["force_include"][file.name] = target

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the file that `initialize` made."""
        if version != "editable":
            Path(self._file).unlink()

    def _commit(self) -> str:
        """Return what LORAPLEX_COMMIT says, else what the source archive or the checkout says, else nothing."""
        if given := os.environ.get("LORAPLEX_COMMIT"):
            return given
        if (archived := Path(self.root, "COMMIT")).is_file():
            return archived.read_text().strip()
        if not Path(self.root, ".git").exists():
            return ""
        command = ["git", "-C", self.root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()
