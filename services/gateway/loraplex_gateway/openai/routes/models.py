"""GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterNotFoundError, InvalidParameterError, LoraplexError
from loraplex_common.ids import AdapterRef
from loraplex_common.rights import GATEWAY

from loraplex_gateway.openai import fields, further_fields
from loraplex_gateway.openai.answers import ModelList, ModelObject
from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint
from loraplex_gateway.openai.errors import BodyNames, error_response
from loraplex_gateway.openai.json_responses import PiecesResponse, json_response
from loraplex_gateway.openai.model_names import ModelName, bases_of, read_model_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_common.admissions import Admission
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from loraplex_gateway.openai.context import HttpContext
    from loraplex_gateway.openai.model_list import Piece
    from loraplex_gateway.openai.model_names import IsBase

MAX_LIMIT: Final = 1000


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return the routes that tell which models there are."""
    routes = _Models(context)
    return [
        Endpoint(
            methods=("GET",),
            path="/v1/models",
            right=GATEWAY + "ListModels",
            handler=routes.models,
            summary="List base models, adapters and their labels.",
            query=further_fields.MODEL_LIST,
            answer=ModelList,
        ),
        Endpoint(
            methods=("GET",),
            path="/v1/models/{name:path}",
            right=GATEWAY + "GetModel",
            handler=routes.model,
            summary="Describe one base model, adapter, label or revision.",
            answer=ModelObject,
        ),
    ]


class _Models:
    def __init__(self, context: HttpContext) -> None:
        self._context = context

    async def models(self, request: Request, admission: Admission) -> ASGIApp:
        """List what `model` may name."""
        limit, after = _paging(request)
        caller, models = admission.principal, self._context.models
        if limit is None and not after:
            pieces = await models.pieces(caller)
            return await PiecesResponse.of(_whole(pieces), slow_client_s=self._context.slow_client_s)
        page, has_more = models.page(caller, limit=limit or MAX_LIMIT, after=after)
        return await PiecesResponse.of(
            _whole(iter([page]), has_more=has_more), slow_client_s=self._context.slow_client_s
        )

    async def model(self, request: Request, admission: Admission) -> ASGIApp:
        """Describe what one name means."""
        asked, caller = request.path_params["name"], admission.principal
        try:
            name = _model_name(asked, bases_of(self._context.catalog, caller))
            card = await self._context.listing.get(
                name.adapter or name.base, caller, base=name.base if name.adapter else ""
            )
        except LoraplexError as error:
            return error_response(error, BodyNames(fields.MODEL_PATH))
        return json_response(
            ModelObject(
                id=asked,
                created=card.created,
                root=card.revision or card.name,
                parent=card.base_model if card.revision else None,
                max_model_len=card.max_model_len,
            )
        )


def _model_name(text: str, is_base: IsBase) -> ModelName:
    """Return what a name of a path means.

    Raises:
        AdapterNotFoundError: If nothing can have it.
        InvalidParameterError: If it is the name of a base model and of an adapter.
    """
    try:
        name = read_model_name(text, is_base)
        if name.adapter:
            AdapterRef.parse(name.adapter, field="model")
    except InvalidParameterError as error:
        if error.metadata:  # two have the name
            raise
        raise AdapterNotFoundError(error.message, field="model") from error
    return name


def _whole(pieces: Iterator[Piece], *, has_more: bool = False) -> Iterator[bytes]:
    """Yield the parts of a list's JSON."""
    first = last = None
    yield b'{"object":"list","data":['
    for piece in pieces:
        if not piece.entries:
            continue
        if first is not None:
            yield b","
        yield piece.body
        first, last = first or piece.entries[0].id, piece.entries[-1].id
    ids = [b"null" if name is None else b'"' + name.encode() + b'"' for name in (first, last)]
    yield b'],"has_more":%s,"first_id":%s,"last_id":%s}' % (b"true" if has_more else b"false", *ids)


def _paging(request: Request) -> tuple[int | None, str]:
    """Return `limit`, None if absent, and `after`.

    Raises:
        InvalidParameterError: If one is malformed or there twice, or there are other parameters.
    """
    query = request.query_params
    for name in query:
        if name not in further_fields.MODEL_LIST.fields:
            known = ", ".join(further_fields.MODEL_LIST.fields)
            raise InvalidParameterError(f"unknown parameter {name[:64]!r}: this list takes {known}", field=name[:64])
    cursors = [name for name, _ in query.multi_items() if name != "limit"]
    if len(cursors) > 1 or len(query.getlist("limit")) > 1:
        name = "limit" if len(cursors) < 2 else cursors[0]
        raise InvalidParameterError("send limit at most once, and one of after and after_id", field=name)
    limit = query.get("limit")
    if limit is not None and not (
        limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= MAX_LIMIT
    ):
        raise InvalidParameterError(
            f"limit is {limit[:64]!r}; it must be in [1, {MAX_LIMIT}]; leave it out for the whole list", field="limit"
        )
    return None if limit is None else int(limit), query.get("after", query.get("after_id", ""))
