"""The version of this build: the installed package's own word, so that it is written in one place (pyproject.toml)."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Final

DISTRIBUTION: Final = "loraplex"


@functools.cache
def package_version() -> str:
    """Return the version of the installed package, e.g. ``0.1.0``."""
    return importlib.metadata.version(DISTRIBUTION)
