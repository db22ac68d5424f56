"""Sources in the place of an adapter's name: ``hf:org/name@commit``, ``s3://bucket/folder``, ``oci://registry/repo@sha256:...``.

None of them can be the name of an adapter, with a label or without: a label has no slash.
"""

from __future__ import annotations

import hashlib
from typing import Final

HUB: Final = "hf:"
_URIS: Final = ("s3://", "oci://")
RESOLVED: Final = "resolved/"
"""What the names of adapters that were resolved at request time begin with."""
_DIGITS: Final = 32


def is_source(text: str) -> bool:
    """Return whether a text in the place of an adapter's name is a source."""
    return text.startswith(_URIS) or (text.startswith(HUB) and "/" in text)


def resolved_name(tenant: str, source: str) -> str:
    """Return the name under which the store keeps a source's adapter for a tenant.

    Each tenant has a name of its own, so that no tenant sees, uses or evicts what another one has resolved.
    """
    digest = hashlib.sha256(f"{tenant}\0{source}".encode(errors="surrogatepass")).hexdigest()
    return RESOLVED + digest[:_DIGITS]
