"""An endpoint: the path of a route of the HTTP port, the right that it takes, and the code that answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.routing import Route

from loraplex_gateway.openai.fields import Table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from loraplex_common.admissions import Admission
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from loraplex_gateway.openai.context import HttpContext

    Handler = Callable[[Request, Admission], Awaitable[ASGIApp]]
    OpenHandler = Callable[[Request], Awaitable[ASGIApp]]


class _WholePath(Route):
    """A route of a whole path: starlette's own ends in front of a line break (``$``), and its parameters take none."""

    def __init__(self, path: str, endpoint: Callable[..., Any], *, methods: list[str]) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """A route that takes a credential.

    Attributes:
        methods: HTTP methods.
        path: As starlette writes it.
        right: Full name of the method that the route stands for; a caller needs the right to make that call.
        handler: Answers; it runs for callers that have the right.
        summary: One sentence for people.
        body: Struct of the request's body; None if it has none.
        query: Parameters behind the question mark; None if there are none.
        table: What the fields of the body are for; None takes the struct alone.
        answer: Struct of the answer with status 200, str for plain text; None if the document says no more than that it is JSON.
        is_streamed: Whether the answer may be server-sent events instead.
        is_served: False for a route that only says why it is not served; the document leaves it out.
        statuses: Statuses that come with such an answer; the others come with an error.
    """

    methods: tuple[str, ...] = ("POST",)
    path: str
    right: str
    handler: Handler
    summary: str
    body: type[msgspec.Struct] | None = None
    query: Table | None = None
    table: Table | None = None
    answer: type[msgspec.Struct | str] | None = None
    is_streamed: bool = False
    is_served: bool = True
    statuses: tuple[int, ...] = (200,)

    def route(self, context: HttpContext) -> Route:
        """Return the route, which lets callers in before anything of theirs is read."""

        async def answer(request: Request) -> ASGIApp:
            return await self.handler(request, context.admit(request, self.right))

        return _WholePath(self.path, answer, methods=list(self.methods))


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenEndpoint:
    """A route for probes and tools that come without a credential; it shows nothing about tenants."""

    methods: tuple[str, ...] = ("GET",)
    path: str
    handler: OpenHandler
    summary: str
    answer: type[msgspec.Struct | str] | None = None
    statuses: tuple[int, ...] = (200,)

    def route(self, context: HttpContext) -> Route:
        """Return the route."""
        return _WholePath(self.path, self.handler, methods=list(self.methods))
