"""GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loraplex_common.errors import LoraplexError
from loraplex_common.rights import GATEWAY
from starlette.responses import JSONResponse, Response

from loraplex_gateway.openai import fields
from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint
from loraplex_gateway.openai.errors import BodyNames, error_response
from loraplex_gateway.openai.render import model_object

if TYPE_CHECKING:
    from loraplex_common.admissions import Admission
    from starlette.requests import Request

    from loraplex_gateway.openai.context import HttpContext

MODELS_AT_A_TIME: Final = 256


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return the routes that tell which models there are."""
    routes = _Models(context)
    return [
        Endpoint(
            methods=("GET",),
            path="/v1/models",
            right=GATEWAY + "ListModels",
            handler=routes.models,
            summary="List base models and adapters.",
        ),
        Endpoint(
            methods=("GET",),
            path="/v1/models/{name:path}",
            right=GATEWAY + "GetModel",
            handler=routes.model,
            summary="Describe one base model or adapter.",
        ),
    ]


class _Models:
    def __init__(self, context: HttpContext) -> None:
        self._context = context
        self._started_at = int(time.time())

    async def models(self, request: Request, admission: Admission) -> Response:
        """List base models and adapters."""
        data: list[dict[str, Any]] = []
        for card in self._context.listing.all(admission.principal):
            data.append(model_object(card, self._started_at))
            if len(data) % MODELS_AT_A_TIME == 0:
                await asyncio.sleep(0)  # streams go on meanwhile
        return Response(msgspec.json.encode({"object": "list", "data": data}), media_type="application/json")

    async def model(self, request: Request, admission: Admission) -> Response:
        """Describe one base model or adapter."""
        try:
            card = await self._context.listing.get(request.path_params["name"], admission.principal)
        except LoraplexError as error:
            return error_response(error, BodyNames(fields.MODEL_PATH))
        return JSONResponse(model_object(card, self._started_at))
