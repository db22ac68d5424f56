"""Bodies of /v1/load_lora_adapter and /v1/unload_lora_adapter, and the source that a path means."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote

import msgspec
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.adapters.store_admin import AdapterSource
from loraplex_gateway.openai import further_fields
from loraplex_gateway.openai.body import BODIES

_HUB: Final = re.compile(
    r"(?P<mark>hf:)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<subfolder>(/\w[\w.-]*)*)(@(?P<revision>[^@]+))?",
    re.ASCII,
)


class LoadAdapterBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadAdapterBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


BODIES[LoadAdapterBody] = further_fields.LOAD_ADAPTER
BODIES[UnloadAdapterBody] = further_fields.UNLOAD_ADAPTER


def source_of(path: str) -> AdapterSource:
    """Return where an adapter's files are.

    Raises:
        InvalidParameterError: If the path is no source's.
    """
    if path.startswith(("file:", "s3://", "oci://")):
        return AdapterSource(uri=path)
    if path.startswith("/"):
        return AdapterSource(uri=f"file://{quote(path)}")
    match = _HUB.fullmatch(path)
    if match is None or (match["subfolder"] and not match["mark"]):
        raise InvalidParameterError(
            f"lora_path is {path[:200]!r}; write the absolute path of a directory below an import root of the adapter "
            "store, org/name, hf:org/name[/folder][@commit], s3://bucket/folder or oci://registry/repository@sha256:...",
            field="lora_path",
        )
    return AdapterSource(
        repo=match["repo"], revision=match["revision"] or "", subfolder=match["subfolder"].removeprefix("/")
    )
