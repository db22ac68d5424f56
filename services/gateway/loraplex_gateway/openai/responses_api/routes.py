"""POST /v1/responses, and what is said where a client asks for something that was kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.rights import GATEWAY
from starlette.exceptions import HTTPException

from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint
from loraplex_gateway.openai.generating import generation, read_body
from loraplex_gateway.openai.responses_api import fields
from loraplex_gateway.openai.responses_api.convert import responses_request
from loraplex_gateway.openai.responses_api.render import ResponsesAnswer
from loraplex_gateway.openai.responses_api.schema import ResponsesBody
from loraplex_gateway.openai.tracing import origin_of

if TYPE_CHECKING:
    from loraplex_common.admissions import Admission
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from loraplex_gateway.openai.context import HttpContext

RIGHT: Final = GATEWAY + "Generate"
NOT_KEPT: Final = (
    "responses are not kept: there is none to read, cancel, compact or delete; POST /v1/responses with all items of the "
    "conversation as input"
)


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return the routes of the Responses API."""
    routes = _Responses(context)
    return [
        Endpoint(
            path="/v1/responses",
            right=RIGHT,
            handler=routes.create,
            summary="Continue a conversation of items.",
            body=ResponsesBody,
            table=fields.RESPONSES,
            is_streamed=True,
        ),
        Endpoint(
            methods=("GET", "POST", "DELETE"),
            path="/v1/responses/{rest:path}",
            right=RIGHT,
            handler=routes.kept,
            summary="Not served: responses are not kept.",
            is_served=False,
        ),
    ]


class _Responses:
    def __init__(self, context: HttpContext) -> None:
        self._context = context

    async def create(self, request: Request, admission: Admission) -> ASGIApp:
        """Continue a conversation."""
        origin = origin_of(request.scope)
        asked = await read_body(
            self._context, request, admission, lambda data, is_base: responses_request(data, is_base, origin=origin)
        )
        return generation(self._context, asked.plan.requests, ResponsesAnswer(asked), admission)

    async def kept(self, request: Request, admission: Admission) -> ASGIApp:
        """Say why nothing is found."""
        raise HTTPException(404, NOT_KEPT)
