"""POST /v1/messages and POST /v1/messages/count_tokens, with the credential and the errors of Anthropic's API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError, LoraplexError
from loraplex_common.interceptors import internal_error
from loraplex_common.rights import GATEWAY
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint
from loraplex_gateway.openai.generating import generation, read_body
from loraplex_gateway.openai.messages_api import errors, fields
from loraplex_gateway.openai.messages_api.convert import count_tokens_plan, messages_plan
from loraplex_gateway.openai.messages_api.render import MessagesAnswer
from loraplex_gateway.openai.messages_api.schema import CountTokensBody, MessagesBody
from loraplex_gateway.openai.tracing import origin_of
from loraplex_gateway.requests.validation import check_adapters, check_prompt
from loraplex_gateway.weighted import names_by_field

if TYPE_CHECKING:
    from loraplex_common.admissions import Admission
    from loraplex_common.auth import Principal
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from loraplex_gateway.openai.context import HttpContext
    from loraplex_gateway.types import GenerationRequest

API_KEY: Final = b"x-api-key"
AUTHORIZATION: Final = b"authorization"
# Their answers have one shape. The later one has no sampling fields; here they are served as extra fields in both.
VERSIONS: Final = ("2023-06-01", "2026-10-21")
ALL_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
NO_BATCHES: Final = "is not served here: there are POST /v1/messages and POST /v1/messages/count_tokens, no batches"


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return the routes of the Messages API."""
    routes = _Messages(context)
    return [
        MessagesEndpoint(
            path="/v1/messages",
            right=GATEWAY + "Generate",
            handler=routes.create,
            summary="Continue a conversation, as Anthropic's API does.",
            body=MessagesBody,
            table=fields.MESSAGES,
            is_streamed=True,
        ),
        MessagesEndpoint(
            path="/v1/messages/count_tokens",
            right=GATEWAY + "CountTokens",
            handler=routes.count_tokens,
            summary="Count a prompt's tokens, as Anthropic's API does.",
            body=CountTokensBody,
            table=fields.COUNT_TOKENS,
        ),
        *(
            MessagesEndpoint(
                methods=ALL_METHODS,
                path=path,
                right=GATEWAY + "Generate",
                handler=routes.elsewhere,
                summary="Not served.",
                is_served=False,
            )
            for path in ("/v1/messages", "/v1/messages/{rest:path}")
        ),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class MessagesEndpoint(Endpoint):
    """A route with the manners of Anthropic's API: a key in x-api-key, its errors, its header with the request's id."""

    def route(self, context: HttpContext) -> Route:
        """Return the route, which lets callers in before anything of theirs is read."""

        async def answer(request: Request) -> ASGIApp:
            trace_id = origin_of(request.scope).trace_id
            try:
                admission = context.admit(_with_key(request), self.right)
                _check_version(request.headers.get("anthropic-version", VERSIONS[0]))
                return _WithId(await self.handler(request, admission), trace_id)
            except LoraplexError as error:
                return errors.refusal(error, trace_id)
            except Exception as error:
                return errors.refusal(internal_error(request.url.path, error), trace_id)

        return Route(self.path, answer, methods=list(self.methods))


class _Messages:
    def __init__(self, context: HttpContext) -> None:
        self._context = context

    async def create(self, request: Request, admission: Admission) -> ASGIApp:
        """Continue a conversation."""
        origin = origin_of(request.scope)
        plan = await read_body(
            self._context, request, admission, lambda data, is_base: messages_plan(data, is_base, origin=origin)
        )
        answer = MessagesAnswer(plan, trace_id=origin.trace_id)
        return generation(self._context, plan.requests, answer, admission)

    async def count_tokens(self, request: Request, admission: Admission) -> ASGIApp:
        """Count the tokens of a prompt."""
        origin = origin_of(request.scope)
        plan = await read_body(
            self._context, request, admission, lambda data, is_base: count_tokens_plan(data, is_base, origin=origin)
        )
        try:
            num_tokens = await self._num_tokens(plan.requests[0], admission.principal)
        except LoraplexError as error:
            return errors.refusal(error, origin.trace_id, plan.names)
        return JSONResponse({"input_tokens": num_tokens})

    async def _num_tokens(self, asked: GenerationRequest, caller: Principal) -> int:
        check_prompt(asked.prompt)
        assert asked.prompt is not None  # check_prompt
        check_adapters(asked.adapter, asked.adapters)
        core, adapters = self._context.core, names_by_field(asked.adapter, asked.adapters)
        model = await core.voice(asked.model, adapters, caller=caller, prompt=asked.prompt)
        return len((await core.encode(model, asked.prompt, tenant=caller.name)).ids)

    async def elsewhere(self, request: Request, admission: Admission) -> ASGIApp:
        """Say that there is no such route."""
        is_known = request.url.path in ("/v1/messages", "/v1/messages/count_tokens")
        status = 405 if is_known else 404
        message = f"{request.method} {request.url.path} {NO_BATCHES}"
        body = errors.error_body(status, message, origin_of(request.scope).trace_id)
        return Response(body, status, {"allow": "POST"} if is_known else None, media_type="application/json")


class _WithId:
    """An answer with the header in which Anthropic's clients look for a request's id."""

    def __init__(self, answer: ASGIApp, trace_id: str) -> None:
        self._answer = answer
        self._header = (errors.REQUEST_ID.encode(), trace_id.encode("ascii"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = [name for name, _ in message.get("headers", ())]
                if self._header[0] not in names:
                    message = {**message, "headers": [*message.get("headers", ()), self._header]}
            await send(message)

        await self._answer(scope, receive, send_with_id)


def _with_key(request: Request) -> Request:
    """Return a request whose key stands where the other APIs have it; x-api-key goes before Authorization, as at Anthropic's."""
    key = next((value for name, value in request.scope["headers"] if name == API_KEY), None)
    if key is None:
        return request
    others = [(name, value) for name, value in request.scope["headers"] if name != AUTHORIZATION]
    return Request({**request.scope, "headers": [*others, (AUTHORIZATION, b"Bearer " + key)]}, request.receive)


def _check_version(version: str) -> None:
    if version not in VERSIONS:
        raise InvalidParameterError(
            f"anthropic-version {version[:64]!r} is not served; send {' or '.join(VERSIONS)}, or leave the header out",
            field="anthropic-version",
        )
