"""The version of this build, from the installed package, so that it is written in one place (pyproject.toml)."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Final

DISTRIBUTION: Final = "loraplex"
NOT_INSTALLED: Final = "0+not.installed"


@functools.cache
def package_version() -> str:
    """Return the version of the installed package, e.g. ``0.1.0``; `NOT_INSTALLED` for sources on the path alone."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
