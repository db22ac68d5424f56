"""Bodies of the HTTP port's small answers, and what the OpenAPI document says of them."""

from __future__ import annotations

from typing import Any

import msgspec


class ModelObject(msgspec.Struct, kw_only=True):
    """Something that `model` can name: a base model, an adapter, or a label of an adapter."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "loraplex"
    root: str
    parent: str | None
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """Answer of GET /v1/models; the last three fields page as Anthropic's list does."""

    object: str = "list"
    data: list[ModelObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class TokenizeAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Answer of POST /tokenize; `token_strs` is there if it was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(msgspec.Struct, kw_only=True):
    """Answer of POST /detokenize."""

    prompt: str


class Version(msgspec.Struct, kw_only=True):
    """Answer of GET /version."""

    version: str


class Load(msgspec.Struct, kw_only=True):
    """Answer of GET /load: requests that run on engines or wait for it, of this gateway."""

    server_load: int


class Health(msgspec.Struct, kw_only=True):
    """Answer of the health routes."""

    status: str


class ErrorObject(msgspec.Struct, kw_only=True):
    """What went wrong: `code` is OpenAI's where it has one, `reason` is ours, `param` the offending field."""

    message: str
    type: str
    param: str | None
    code: str | None
    reason: str | None = None
    violations: list[dict[str, Any]] | None = None


class ErrorBody(msgspec.Struct, kw_only=True):
    """Body of every answer with a status of 400 or more."""

    error: ErrorObject
