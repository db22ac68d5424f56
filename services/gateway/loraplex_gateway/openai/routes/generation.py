"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.rights import GATEWAY

from loraplex_gateway.openai import convert, fields
from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint
from loraplex_gateway.openai.generating import generation, read_body
from loraplex_gateway.openai.openai_answer import OpenAIAnswer
from loraplex_gateway.openai.schema import ChatBody, CompletionBody
from loraplex_gateway.openai.tracing import origin_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.admissions import Admission
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from loraplex_gateway.openai.context import HttpContext
    from loraplex_gateway.openai.convert import Plan
    from loraplex_gateway.openai.model_names import IsBase


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return the routes that generate text."""
    routes = _Generation(context)
    return [
        Endpoint(
            path="/v1/completions",
            right=GATEWAY + "Generate",
            handler=routes.completions,
            summary="Continue text.",
            body=CompletionBody,
            table=fields.COMPLETION,
            is_streamed=True,
        ),
        Endpoint(
            path="/v1/chat/completions",
            right=GATEWAY + "Generate",
            handler=routes.chat_completions,
            summary="Continue a conversation.",
            body=ChatBody,
            table=fields.CHAT,
            is_streamed=True,
        ),
    ]


class _Generation:
    def __init__(self, context: HttpContext) -> None:
        self._context = context

    async def completions(self, request: Request, admission: Admission) -> ASGIApp:
        """Continue text."""
        origin = origin_of(request.scope)
        return await self._planned(
            request,
            admission,
            lambda data, is_base: convert.completion_plan(convert.decode(data, CompletionBody), is_base, origin=origin),
        )

    async def chat_completions(self, request: Request, admission: Admission) -> ASGIApp:
        """Continue a conversation."""
        origin = origin_of(request.scope)
        return await self._planned(
            request,
            admission,
            lambda data, is_base: convert.chat_plan(convert.decode(data, ChatBody), is_base, origin=origin),
        )

    async def _planned(self, request: Request, admission: Admission, plan: Callable[[bytes, IsBase], Plan]) -> ASGIApp:
        planned = await read_body(self._context, request, admission, plan)
        return generation(self._context, planned.requests, OpenAIAnswer(planned), admission)
