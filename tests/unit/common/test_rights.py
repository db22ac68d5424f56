"""The table of rights: it covers the contract, and a role may do what it says and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from google.longrunning import operations_pb2
from loraplex.keda import externalscaler_pb2
from loraplex.v1 import adapter_pb2, adapter_store_pb2, engine_pb2, fleet_pb2, gateway_pb2
from loraplex_common.auth import Authenticator, Principal, Role
from loraplex_common.errors import RoleForbiddenError
from loraplex_common.rights import METRICS_READERS, RIGHTS, SCALER, require_right

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor

PROTOS = (adapter_pb2, adapter_store_pb2, engine_pb2, externalscaler_pb2, fleet_pb2, gateway_pb2, operations_pb2)
AUTHENTICATOR = Authenticator({f"key-{role}": Principal(name=f"a-{role}", role=role) for role in Role})


def rpcs() -> set[str]:
    files: list[FileDescriptor] = [proto.DESCRIPTOR for proto in PROTOS]
    services = [service for file in files for service in file.services_by_name.values()]
    return {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}


def test_every_rpc_of_every_proto_has_a_row_and_every_row_an_rpc() -> None:
    assert set(RIGHTS) == rpcs()
    assert all(RIGHTS.values()), "an RPC that nobody may call"


@pytest.mark.parametrize("method", sorted(RIGHTS))
@pytest.mark.parametrize("role", list(Role))
def test_a_role_may_do_what_the_table_says_and_is_told_what_it_takes_for_the_rest(method: str, role: Role) -> None:
    admission = AUTHENTICATOR.admit(f"Bearer key-{role}")

    if role in RIGHTS[method]:
        require_right(admission, method)
        return
    with pytest.raises(RoleForbiddenError, match=f"{role} 'a-{role}' may not call {method[1:]}: it takes") as caught:
        require_right(admission, method)
    needed = ",".join(sorted(RIGHTS[method]))
    assert caught.value.metadata == {"role": role.value, "rpc": method[1:], "roles_needed": needed}


def test_services_are_no_tenants_and_scrapers_ask_what_engines_are_needed_and_nothing_else() -> None:
    generating = {role for method, roles in RIGHTS.items() if "GatewayService" in method for role in roles}

    assert generating == {Role.TENANT, Role.ADMIN}
    of_scrapers = {method for method, roles in RIGHTS.items() if Role.METRICS in roles}
    assert of_scrapers == {method for method in RIGHTS if method.startswith(SCALER)}
    assert all(RIGHTS[method] == METRICS_READERS for method in of_scrapers)


def test_what_the_table_does_not_know_nobody_may() -> None:
    with pytest.raises(RoleForbiddenError, match="no role has this right"):
        require_right(AUTHENTICATOR.admit("Bearer key-admin"), "/loraplex.v1.NewService/New")


def test_without_keys_everybody_may_do_everything() -> None:
    for method in RIGHTS:
        require_right(Authenticator().admit(None), method)
