"""The routes of the HTTP port: OpenAI's API, /health, /version. All but health ask for credentials, if there are any."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loraplex_common.auth import Authenticator
from loraplex_common.errors import LoraplexError
from loraplex_common.interceptors import internal_error
from loraplex_common.rights import GATEWAY, require_right
from loraplex_common.version import package_version
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from loraplex_gateway.openai import convert, fields
from loraplex_gateway.openai.body_reader import BodyReader
from loraplex_gateway.openai.choices import generate_choices
from loraplex_gateway.openai.connections import certificate_of
from loraplex_gateway.openai.errors import BodyNames, error_response
from loraplex_gateway.openai.openai_answer import OpenAIAnswer
from loraplex_gateway.openai.render import model_object
from loraplex_gateway.openai.responses import GenerationResponse
from loraplex_gateway.openai.schema import ChatBody, CompletionBody
from loraplex_gateway.openai.tracing import TraceIds, origin_of
from loraplex_gateway.quotas.calls import TenantQuotas
from loraplex_gateway.requests.core import GatewayCore
from loraplex_gateway.requests.listing import ModelListing
from loraplex_gateway.text.fair_workers import FairWorkers
from loraplex_gateway.text.models import ModelCatalog

if TYPE_CHECKING:
    from loraplex_common.admissions import Admission
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from loraplex_gateway.openai.convert import Plan

MODELS_AT_A_TIME: Final = 256
# A millisecond or two of reading JSON.
INLINE_MAX_BODY_BYTES: Final = 32 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpContext:
    """What the routes call."""

    core: GatewayCore
    quotas: TenantQuotas
    catalog: ModelCatalog
    listing: ModelListing
    authenticator: Authenticator
    metrics_address: Callable[[], str]
    bodies: BodyReader
    workers: FairWorkers
    slow_client_s: float
    is_ready: Callable[[], bool]


def make_app(context: HttpContext) -> ASGIApp:
    """Return the ASGI application."""
    routes = _Routes(context)
    app = Starlette(
        routes=[
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat_completions, methods=["POST"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/health", routes.health, methods=["GET"]),
            Route("/version", routes.version, methods=["GET"]),
            Route("/healthz", routes.health, methods=["GET"]),
        ],
        exception_handlers={LoraplexError: _on_error, HTTPException: _on_no_route, Exception: _on_unexpected},
    )
    return TraceIds(app)


class _Routes:
    def __init__(self, context: HttpContext) -> None:
        self._context = context
        self._started_at = int(time.time())

    async def models(self, request: Request) -> Response:
        """List base models and adapters."""
        data: list[dict[str, Any]] = []
        for card in self._context.listing.all(self._admit(request, "ListModels").principal):
            data.append(model_object(card, self._started_at))
            if len(data) % MODELS_AT_A_TIME == 0:
                await asyncio.sleep(0)  # streams go on meanwhile
        return Response(msgspec.json.encode({"object": "list", "data": data}), media_type="application/json")

    async def model(self, request: Request) -> Response:
        """Describe one base model or adapter."""
        caller = self._admit(request, "GetModel").principal
        try:
            card = await self._context.listing.get(request.path_params["name"], caller)
        except LoraplexError as error:
            return error_response(error, BodyNames(fields.MODEL_PATH))
        return JSONResponse(model_object(card, self._started_at))

    async def completions(self, request: Request) -> ASGIApp:
        """Continue text."""
        origin = origin_of(request.scope)
        return await self._planned(
            request,
            lambda data, is_base: convert.completion_plan(convert.decode(data, CompletionBody), is_base, origin=origin),
        )

    async def chat_completions(self, request: Request) -> ASGIApp:
        """Continue a conversation."""
        origin = origin_of(request.scope)
        return await self._planned(
            request, lambda data, is_base: convert.chat_plan(convert.decode(data, ChatBody), is_base, origin=origin)
        )

    async def metrics(self, request: Request) -> Response:
        """Say where they went: a client that reaches this port need not learn how the service fares."""
        text = f"metrics are not served here: GET /metrics on {self._context.metrics_address()} (--metrics-port)\n"
        return PlainTextResponse(text, 404)

    async def health(self, request: Request) -> Response:
        """Say whether requests can be served."""
        is_ready = self._context.is_ready()
        body = {"status": "ok" if is_ready else "not ready"}
        return Response(msgspec.json.encode(body), 200 if is_ready else 503, media_type="application/json")

    async def version(self, request: Request) -> Response:
        """Say which build this is, as vLLM does."""
        self._admit(request, "ListModels")
        return JSONResponse({"version": package_version()})

    async def _planned(self, request: Request, plan: Callable[[bytes, convert.IsBase], Plan]) -> ASGIApp:
        context, admission = self._context, self._admit(request, "Generate")
        caller = admission.principal

        def is_base(name: str) -> bool:
            return context.catalog.find(name, caller) is not None

        async with context.bodies.read(request, tenant=caller.name) as data:
            if len(data) <= INLINE_MAX_BODY_BYTES:
                return self._generate(plan(data, is_base), admission)
            work = functools.partial(plan, data, is_base)
            prepared = await context.workers.run(work, tenant=caller.name, num_bytes=len(data))
            return self._generate(prepared, admission)

    def _generate(self, plan: Plan, admission: Admission) -> ASGIApp:
        context = self._context
        quota = context.quotas.call(admission.principal.name, len(plan.requests))
        events = generate_choices(context.core, plan.requests, caller=admission.principal, quota=quota)
        return GenerationResponse(
            events, OpenAIAnswer(plan), admission=admission, quota=quota, slow_client_s=context.slow_client_s
        )

    def _admit(self, request: Request, rpc: str) -> Admission:
        """Return the caller, by key or certificate as over gRPC, if it may make the call that a route stands for."""
        authorization, certificate = request.headers.get("authorization"), certificate_of(request.scope)
        admission = self._context.authenticator.admit(authorization, certificate=certificate)
        require_right(admission, GATEWAY + rpc)
        return admission


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoraplexError)
    return error_response(error)


async def _on_no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path} is not served here: {error.detail}"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, error.status_code, error.headers)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    return error_response(internal_error(request.url.path, error))
