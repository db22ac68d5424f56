"""What every route that generates does: read the body away from the loop if it is long, run the requests, answer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeVar

from loraplex_gateway.openai.choices import generate_choices
from loraplex_gateway.openai.model_names import bases_of
from loraplex_gateway.openai.responses import GenerationResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loraplex_common.admissions import Admission
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from loraplex_gateway.openai.answer import Answer
    from loraplex_gateway.openai.context import HttpContext
    from loraplex_gateway.openai.model_names import IsBase
    from loraplex_gateway.types import GenerationRequest

Asked = TypeVar("Asked")


async def read_body(
    context: HttpContext, request: Request, admission: Admission, read: Callable[[bytes, IsBase], Asked]
) -> Asked:
    """Return what a request's body asks for.

    Args:
        context: What the routes share.
        request: The request.
        admission: Its caller.
        read: Makes of the bytes what they ask for.

    Raises:
        LoraplexError: If the body does not come, or asks for something that is not served.
    """
    caller = admission.principal
    async with context.bodies.read(request, tenant=caller.name) as data:
        work = functools.partial(read, data, bases_of(context.catalog, caller))
        return await context.away(work, caller, num_bytes=len(data))


def generation(
    context: HttpContext, requests: Sequence[GenerationRequest], answer: Answer, admission: Admission
) -> ASGIApp:
    """Return the response that runs requests, one for each choice, for their caller."""
    caller = admission.principal
    quota = context.quotas.call(caller.name, len(requests))
    events = generate_choices(context.core, requests, caller=caller, quota=quota)
    return GenerationResponse(events, answer, admission=admission, quota=quota, slow_client_s=context.slow_client_s)
