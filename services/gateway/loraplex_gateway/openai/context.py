"""What the HTTP routes share: the objects that they call, and how each of them lets its callers in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from loraplex_common.auth import Authenticator
from loraplex_common.rights import require_right

from loraplex_gateway.adapters.store_admin import StoreAdmin
from loraplex_gateway.openai.body_reader import BodyReader
from loraplex_gateway.openai.client_certificates import certificate_of
from loraplex_gateway.openai.fleet_page import FleetPage
from loraplex_gateway.openai.model_list import ModelList
from loraplex_gateway.quotas.calls import TenantQuotas
from loraplex_gateway.requests.core import GatewayCore
from loraplex_gateway.requests.listing import ModelListing
from loraplex_gateway.text.fair_workers import FairWorkers
from loraplex_gateway.text.models import ModelCatalog

if TYPE_CHECKING:
    from loraplex_common.admissions import Admission
    from loraplex_common.auth import Principal
    from starlette.requests import Request

Result = TypeVar("Result")
# A millisecond or two of reading JSON.
INLINE_MAX_BODY_BYTES: Final = 32 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpContext:
    """What the routes call.

    Attributes:
        store_admin: Imports and deletes adapters; None without an adapter store.
        is_local: Whether only this machine reaches the port.
        num_requests: Returns how many requests run or wait, on all workers.
        cors_origins: Origins of web pages that may read answers.
        page: What the page at /ui shows; None where it is off.
    """

    core: GatewayCore
    quotas: TenantQuotas
    catalog: ModelCatalog
    listing: ModelListing
    models: ModelList
    store_admin: StoreAdmin | None
    is_local: bool
    authenticator: Authenticator
    metrics_address: Callable[[], str]
    bodies: BodyReader
    workers: FairWorkers
    slow_client_s: float
    is_ready: Callable[[], bool]
    num_requests: Callable[[], Awaitable[int]]
    cors_origins: tuple[str, ...] = ()
    page: FleetPage | None = None

    def admit(self, request: Request, right: str) -> Admission:
        """Return the caller, by key or certificate as over gRPC, if it may make the call that a route stands for.

        Args:
            request: The request, its body not read yet.
            right: Full name of the method that the route stands for, as `rights.RIGHTS` has it.

        Raises:
            UnauthenticatedError: If its credential is missing or unknown.
            RoleForbiddenError: If its role may not make that call.
        """
        authorization, certificate = request.headers.get("authorization"), certificate_of(request.scope)
        admission = self.authenticator.admit(authorization, certificate=certificate)
        require_right(admission, right)
        return admission

    async def away(self, work: Callable[[], Result], caller: Principal, *, num_bytes: int) -> Result:
        """Return what some work on a body returns, done in a thread if the body is long.

        Raises:
            SaturatedError: If too many long bodies wait already.
            LoraplexError: What the work raises.
        """
        if num_bytes <= INLINE_MAX_BODY_BYTES:
            return work()
        return await self.workers.run(work, tenant=caller.name, num_bytes=num_bytes)
