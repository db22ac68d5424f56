"""Messages about a directory that does not exist: users give hub ids where a path is meant, and the reverse."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def adapter_directory_problem(directory: str | Path) -> str | None:
    """Return why there can be no adapter, with what to write for a hub repository; None if it is a directory."""
    hint = f"; a repository of the Hugging Face hub is hf:{directory}@COMMIT (40 hex digits)"
    return _problem(directory, hint)


def model_directory_problem(directory: str | Path) -> str | None:
    """Return why there can be no base model, with how to fetch a hub repository; None if it is a directory."""
    hint = f"; if it is a repository of the Hugging Face hub: hf download {directory} --local-dir DIR, then give DIR"
    return _problem(directory, hint)


def _problem(directory: str | Path, hint: str) -> str | None:
    path = Path(directory)
    if path.is_dir():
        return None
    if path.exists():
        return f"{directory} is no directory"
    is_hub_id = HUB_ID.fullmatch(os.fspath(directory)) is not None
    return f"{directory}: no such directory{hint if is_hub_id else ''}"
