"""Names of base models as people and trainers write them: hub ids, paths into a hub cache, URLs, folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import urlsplit

UNNAMED: Final = frozenset({"", "n/a", "none", "null"})
"""Values that trainers write if they do not know the base model."""
_CACHE_FOLDER: Final = re.compile(r"models--(?:(?P<org>[^/]+?)--)?(?P<name>[^/]+)")
_DRIVE: Final = re.compile(r"[A-Za-z]:/")


@dataclass(frozen=True, slots=True)
class BaseName:
    """The model that a text names.

    Attributes:
        hub_id: ``ORG/NAME``, or ``NAME`` alone; empty for a path, which means nothing on another machine.
        last: Last component; empty if the text names nothing.
    """

    hub_id: str
    last: str

    @property
    def has_org(self) -> bool:
        """Whether it names the owner of the model."""
        return "/" in self.hub_id

    @classmethod
    def parse(cls, text: str) -> BaseName:
        """Read a ``base_model_name_or_path``, whatever it holds."""
        text = text.strip().replace("\\", "/")
        if text.lower() in UNNAMED:
            return cls("", "")
        if text.lower().startswith(("http://", "https://")):
            return cls._of_url(text)
        text = text.removeprefix("hf://").removeprefix("file://").rstrip("/")
        if (cached := _hub_id_in_cache(PurePosixPath(text))) is not None:
            return cls(cached, cached.rpartition("/")[2])
        last = text.rpartition("/")[2]
        is_path = text.startswith((".", "/", "~")) or _DRIVE.match(text) is not None or text.count("/") > 1
        return cls("" if is_path else text, last)

    @classmethod
    def _of_url(cls, text: str) -> BaseName:
        """Parse the page of a model: its id begins the path, on some hubs after a word like ``models``."""
        parts = [part for part in urlsplit(text).path.split("/") if part]
        hub_id = "/".join(parts[1:3] if parts[:1] == ["models"] else parts[:2])
        return cls(hub_id, hub_id.rpartition("/")[2])


def hub_id_of(directory: Path) -> str | None:
    """Return the hub id of a directory in a hub cache, ``.../models--ORG--NAME/snapshots/COMMIT``; None elsewhere."""
    for path in (directory.absolute(), directory.resolve()):
        if (hub_id := _hub_id_in_cache(path)) is not None:
            return hub_id
    return None


def folder_name(directory: Path) -> str:
    """Return the name that a directory gives its model: the folder's name, or the hub's name in a hub cache."""
    hub_id = hub_id_of(directory)
    return hub_id.rpartition("/")[2] if hub_id else directory.resolve().name


def _hub_id_in_cache(path: PurePosixPath | Path) -> str | None:
    for folder, below in zip(path.parts, path.parts[1:], strict=False):
        if below == "snapshots" and (match := _CACHE_FOLDER.fullmatch(folder)) is not None:
            return f"{match['org']}/{match['name']}" if match["org"] else match["name"]
    # Written by hand, or cut off: it names the model's folder alone.
    match = _CACHE_FOLDER.fullmatch(path.name)
    return f"{match['org']}/{match['name']}" if match is not None and match["org"] else None
