"""The files of the page at /ui: read once, served to every caller, since they show nothing; no path of a request is opened."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

FOLDER: Final = "static"
PAGE: Final = "index.html"
TYPES: Final = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)
# Nothing but this server's own files, no inline script or style, no frame around the page, no form that leaves it.
SECURITY: Final = MappingProxyType(
    {
        "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
)


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file.

    Attributes:
        body: Its bytes.
        media_type: As `Content-Type` says it.
        etag: Changes with the bytes.
    """

    body: bytes
    media_type: str
    etag: str

    def response(self, request: Request) -> Response:
        """Return the file, or that the browser's copy is still good."""
        headers = {**SECURITY, "etag": self.etag}
        if self.etag in [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)


def read_files() -> Mapping[str, PageFile]:
    """Return the files by name."""
    found = {}
    for entry in resources.files(__package__).joinpath(FOLDER).iterdir():
        suffix = entry.name[entry.name.rfind(".") :]
        if suffix in TYPES:
            body = entry.read_bytes()
            found[entry.name] = PageFile(body, TYPES[suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return MappingProxyType(found)
