"""What every route that generates does: read the body away from the loop if it is long, run the requests, answer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, TypeVar

from loraplex_gateway.openai.choices import generate_choices
from loraplex_gateway.openai.responses import GenerationResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loraplex_common.admissions import Admission
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from loraplex_gateway.openai.answer import Answer
    from loraplex_gateway.openai.context import HttpContext
    from loraplex_gateway.openai.convert import IsBase
    from loraplex_gateway.types import GenerationRequest

Asked = TypeVar("Asked")
# A millisecond or two of reading JSON.
INLINE_MAX_BODY_BYTES: Final = 32 * 1024


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

    def is_base(name: str) -> bool:
        return context.catalog.find(name, caller) is not None

    async with context.bodies.read(request, tenant=caller.name) as data:
        if len(data) <= INLINE_MAX_BODY_BYTES:
            return read(data, is_base)
        work = functools.partial(read, data, is_base)
        return await context.workers.run(work, tenant=caller.name, num_bytes=len(data))


def generation(
    context: HttpContext, requests: Sequence[GenerationRequest], answer: Answer, admission: Admission
) -> ASGIApp:
    """Return the response that runs requests, one for each choice, for their caller."""
    caller = admission.principal
    quota = context.quotas.call(caller.name, len(requests))
    events = generate_choices(context.core, requests, caller=caller, quota=quota)
    return GenerationResponse(events, answer, admission=admission, quota=quota, slow_client_s=context.slow_client_s)
