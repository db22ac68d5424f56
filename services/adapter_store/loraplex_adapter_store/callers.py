"""The caller of a change, and what it asks for: what makes a repeated call harmless."""

from __future__ import annotations

import copy
import hashlib
import uuid
from typing import TYPE_CHECKING, TypeAlias

from loraplex_common.auth import current_principal
from loraplex_common.errors import InvalidParameterError

from loraplex_adapter_store.lifecycle import Caller

if TYPE_CHECKING:
    from loraplex.v1 import adapter_store_pb2 as pb

Mutation: TypeAlias = (
    "pb.CreateAdapterRequest | pb.UpdateAdapterRequest | pb.DeleteAdapterRequest | pb.SetAliasRequest | "
    "pb.ImportAdapterRequest | pb.UploadAdapterRequest.Header | pb.PushAdapterRequest.Header | pb.RollBackAliasRequest"
)


def caller_of(request: Mutation) -> Caller:
    """Return the caller of a change, and a digest of the request without its request_id."""
    if not request.request_id:
        return Caller(current_principal())
    try:
        uuid.UUID(request.request_id)
    except ValueError:
        raise InvalidParameterError(f"{request.request_id[:80]!r} is no UUID", field="request_id") from None
    asked = copy.deepcopy(request)
    asked.ClearField("request_id")
    name = asked.DESCRIPTOR.full_name
    content = hashlib.sha256(name.encode() + b"\0" + asked.SerializeToString(deterministic=True)).hexdigest()
    return Caller(current_principal(), request.request_id, content)
