"""GET /ui, its files, and GET /ui/events; none of them without `--ui`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.rights import FLEET
from starlette.exceptions import HTTPException

from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint
from loraplex_gateway.openai.ui.events import FleetEvents
from loraplex_gateway.openai.ui.files import PAGE, read_files

if TYPE_CHECKING:
    from loraplex_common.admissions import Admission
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

    from loraplex_gateway.openai.context import HttpContext
    from loraplex_gateway.openai.fleet_page import FleetPage


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return the page's routes; none where it is off. The document of the API leaves them out: they are no API."""
    if context.page is None:
        return []
    routes = _Page(context, context.page)
    return [  # the first path that fits takes a request
        Endpoint(
            methods=("GET",),
            path="/ui/events",
            right=FLEET + "WatchFleet",
            handler=routes.events,
            summary="Tell what becomes of the fleet and of imports.",
            is_streamed=True,
        ),
        OpenEndpoint(path="/ui", handler=routes.page, summary="Show the page."),
        OpenEndpoint(path="/ui/{name}", handler=routes.file, summary="Return a file of the page."),
    ]


class _Page:
    def __init__(self, context: HttpContext, about: FleetPage) -> None:
        self._context, self._about = context, about
        self._files = read_files()

    async def page(self, request: Request) -> Response:
        """Return the page itself."""
        return self._files[PAGE].response(request)

    async def file(self, request: Request) -> Response:
        """Return one of its files.

        Raises:
            HTTPException: If it has no such file.
        """
        found = self._files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return found.response(request)

    async def events(self, request: Request, admission: Admission) -> ASGIApp:
        """Stream events for as long as the caller listens and may see them."""
        return FleetEvents(self._about, admission, slow_client_s=self._context.slow_client_s)
