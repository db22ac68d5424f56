"""The calls that each role may make: one table for all servers, gRPC and HTTP.

Every server checks it before a handler runs, so a handler only has to check which resources it shows. If no keys are
configured there are no roles, and every caller may make every call.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from loraplex_common.auth import Role
from loraplex_common.errors import RoleForbiddenError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_common.admissions import Admission

OPEN_SERVICES: Final = ("/grpc.health.v1.", "/grpc.reflection.")
"""Services for probes and tools, which come without credentials; they show nothing about tenants."""
METRICS_READERS: Final = frozenset({Role.ADMIN, Role.METRICS})
"""Roles that see tenants and restricted adapters in /metrics, and what waits for engines."""

_USERS: Final = frozenset({Role.TENANT, Role.ADMIN})
_ADMIN: Final = frozenset({Role.ADMIN})
_GATEWAY: Final = frozenset({Role.GATEWAY})
_ENGINE: Final = frozenset({Role.ENGINE})
_WATCHERS: Final = frozenset({Role.ADMIN, Role.GATEWAY})

GATEWAY: Final = "/loraplex.v1.GatewayService/"
FLEET: Final = "/loraplex.v1.FleetService/"
_ENGINES: Final = "/loraplex.v1.EngineService/"
STORE: Final = "/loraplex.v1.AdapterStoreService/"
SCALER: Final = "/externalscaler.ExternalScaler/"
OPERATIONS: Final = "/google.longrunning.Operations/"

RIGHTS: Final[Mapping[str, frozenset[Role]]] = MappingProxyType(
    {
        GATEWAY + "Generate": _USERS,
        GATEWAY + "GenerateOnce": _USERS,
        GATEWAY + "Tokenize": _USERS,
        GATEWAY + "Detokenize": _USERS,
        GATEWAY + "CountTokens": _USERS,
        GATEWAY + "CancelRequest": _USERS,
        GATEWAY + "ListModels": _USERS,
        GATEWAY + "GetModel": _USERS,
        FLEET + "ListEngines": _ADMIN,
        FLEET + "WatchFleet": _ADMIN,
        SCALER + "IsActive": METRICS_READERS,
        SCALER + "StreamIsActive": METRICS_READERS,
        SCALER + "GetMetricSpec": METRICS_READERS,
        SCALER + "GetMetrics": METRICS_READERS,
        # These take raw tokens under any adapter and for any tenant: a gateway checks them before, an engine does not.
        _ENGINES + "Session": _GATEWAY,
        _ENGINES + "GetEngineInfo": _WATCHERS,
        _ENGINES + "WatchLoad": _WATCHERS,
        _ENGINES + "ListAdapters": _WATCHERS,
        _ENGINES + "WatchAdapters": _WATCHERS,
        _ENGINES + "WatchPool": _WATCHERS,
        _ENGINES + "PinAdapter": _ADMIN,
        _ENGINES + "UnpinAdapter": _ADMIN,
        _ENGINES + "EvictAdapter": _ADMIN,
        _ENGINES + "Drain": _ADMIN,
        _ENGINES + "Undrain": _ADMIN,
        # Tenants see their own names and public ones: the store filters.
        STORE + "GetAdapter": _USERS,
        STORE + "GetAdapterReport": _USERS,
        STORE + "ListAdapters": _USERS,
        STORE + "ListAdapterRevisions": _USERS,
        STORE + "CreateAdapter": _ADMIN,
        STORE + "UpdateAdapter": _ADMIN,
        STORE + "DeleteAdapter": _ADMIN,
        STORE + "SetAlias": _ADMIN,
        STORE + "ImportAdapter": _ADMIN,
        # A gateway names the tenant of its request; what tenants may name is the operator's list.
        STORE + "ResolveAdapter": _WATCHERS,
        STORE + "UploadAdapter": _ADMIN,
        STORE + "PushAdapter": _ADMIN,
        STORE + "RollBackAlias": _ADMIN,
        STORE + "ListAliasMoves": _USERS,
        STORE + "DownloadAdapter": _ADMIN,
        STORE + "GetTextParts": _WATCHERS,
        STORE + "PrefetchAdapter": _WATCHERS,
        STORE + "EvictAdapter": _WATCHERS,
        STORE + "WatchAliases": frozenset({Role.ADMIN, Role.GATEWAY, Role.ENGINE}),
        STORE + "AcknowledgeAliases": _WATCHERS,
        STORE + "AttachEngine": _ENGINE,
        # A gateway shows its administrators the imports under way.
        OPERATIONS + "ListOperations": _WATCHERS,
        OPERATIONS + "GetOperation": _ADMIN,
        OPERATIONS + "DeleteOperation": _ADMIN,
        OPERATIONS + "CancelOperation": _ADMIN,
        OPERATIONS + "WaitOperation": _ADMIN,
    }
)
"""Full method name -> the roles that may call it. A method that is not listed may not be called by any role."""


def require_right(admission: Admission, method: str, rights: Mapping[str, frozenset[Role]] = RIGHTS) -> None:
    """Return if a caller may make a call.

    Args:
        admission: The caller.
        method: ``/package.Service/Method``; for HTTP, the method that the route stands for.
        rights: The table.

    Raises:
        RoleForbiddenError: If it may not; metadata has ``role``, ``rpc`` and ``roles_needed``, separated by commas.
    """
    if admission.is_open:
        return
    role, needed = admission.principal.role, rights.get(method, frozenset())
    if role in needed:
        return
    names, rpc = sorted(needed), method.lstrip("/")
    takes = f"it takes the role {' or '.join(names)}" if names else "no role has this right"
    raise RoleForbiddenError(
        f"{role} {admission.principal.name!r} may not call {rpc}: {takes}",
        metadata={"role": role.value, "rpc": rpc, "roles_needed": ",".join(names)},
    )
