"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them, for administrators."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import (
    AdapterNotFoundError,
    InvalidParameterError,
    LoraplexError,
    NotSupportedError,
    RoleForbiddenError,
    UnauthenticatedError,
)
from loraplex_common.ids import DEFAULT_LABEL, check_adapter_name
from loraplex_common.rights import STORE
from starlette.responses import PlainTextResponse, Response

from loraplex_gateway.adapters.store_admin import AdminCall, StoreAdmin
from loraplex_gateway.openai import further_fields
from loraplex_gateway.openai.adapter_bodies import LoadAdapterBody, UnloadAdapterBody, source_of
from loraplex_gateway.openai.body import decode
from loraplex_gateway.openai.endpoint import Endpoint, OpenEndpoint
from loraplex_gateway.openai.errors import BodyNames, error_response

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.admissions import Admission
    from starlette.requests import Request

    from loraplex_gateway.openai.context import HttpContext

# How long the name table may take to hear of a change that the store has made.
HEARD_S: Final = 5.0
IDEMPOTENCY_KEY: Final = "idempotency-key"
_KEY: Final = re.compile(r"[!-~]{1,255}", re.ASCII)


def endpoints(context: HttpContext) -> list[Endpoint | OpenEndpoint]:
    """Return the routes that change which adapters there are."""
    routes = _Adapters(context)
    return [
        Endpoint(
            path="/v1/load_lora_adapter",
            right=STORE + "ImportAdapter",
            handler=routes.load,
            summary="Import an adapter into the adapter store.",
            body=LoadAdapterBody,
            table=further_fields.LOAD_ADAPTER,
            answer=str,
        ),
        Endpoint(
            path="/v1/unload_lora_adapter",
            right=STORE + "DeleteAdapter",
            handler=routes.unload,
            summary="Delete an adapter's name from the adapter store.",
            body=UnloadAdapterBody,
            table=further_fields.UNLOAD_ADAPTER,
            answer=str,
        ),
    ]


class _Adapters:
    def __init__(self, context: HttpContext) -> None:
        self._context = context

    async def load(self, request: Request, admission: Admission) -> Response:
        """Import an adapter and answer once this gateway serves it."""
        store, call = self._store(admission), _call(request, admission)
        async with self._context.bodies.read(request, tenant=admission.principal.name) as data:
            body = decode(data, LoadAdapterBody)
        try:
            name = check_adapter_name(body.lora_name, field="lora_name")
            digest = await store.load(
                name,
                source_of(body.lora_path),
                call,
                base_model=body.base_model_name or "",
                in_place=body.load_inplace,
            )
        except LoraplexError as error:
            return error_response(_told(error, call), BodyNames(further_fields.LOAD_ADAPTER, body))
        await self._heard(lambda: self._latest(name, admission) == digest)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request, admission: Admission) -> Response:
        """Delete a name and answer once this gateway knows it no more."""
        store, call = self._store(admission), _call(request, admission)
        async with self._context.bodies.read(request, tenant=admission.principal.name) as data:
            body = decode(data, UnloadAdapterBody)
        try:
            name = check_adapter_name(body.lora_name, field="lora_name")
            await store.unload(name, call)
        except AdapterNotFoundError:
            missing = AdapterNotFoundError(f"The lora adapter {body.lora_name!r} cannot be found.")
            return error_response(missing, BodyNames(further_fields.UNLOAD_ADAPTER, body))
        except LoraplexError as error:
            return error_response(_told(error, call), BodyNames(further_fields.UNLOAD_ADAPTER, body))
        await self._heard(lambda: self._latest(name, admission) is None)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _store(self, admission: Admission) -> StoreAdmin:
        """Return the store, for a caller that may change it.

        Raises:
            NotSupportedError: If there is no adapter store.
            RoleForbiddenError: If every caller of a network would be an administrator.
        """
        store = self._context.store_admin
        if store is None:
            raise NotSupportedError("this gateway has no adapter store (--store-target): it serves base models alone")
        if admission.is_open and not self._context.is_local:
            raise RoleForbiddenError(
                "adapters are loaded and unloaded by administrators: start this gateway with --api-keys-file, which says "
                "who is one, or import with `loraplex adapters import`"
            )
        return store

    def _latest(self, name: str, admission: Admission) -> str | None:
        entry = self._context.listing.names.entry(name, admission.principal)
        return entry.labels.get(DEFAULT_LABEL) if entry is not None else None

    async def _heard(self, is_known: Callable[[], bool]) -> None:
        """Wait until the name table has a change, so that the caller's next request here meets it.

        A store that is lost just now tells it later; and another administrator may have changed the name again.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARD_S):
                await self._context.listing.names.wait_until(is_known)


def _call(request: Request, admission: Admission) -> AdminCall:
    """Return the call behind a request.

    Raises:
        InvalidParameterError: If it is one that a web page could have its reader's browser make, or the key is malformed.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise InvalidParameterError("send Content-Type: application/json", field="content-type")
    key = request.headers.get(IDEMPOTENCY_KEY, "")
    if key and _KEY.fullmatch(key) is None:
        raise InvalidParameterError(
            "Idempotency-Key must be 1 to 255 printable ASCII characters", field=IDEMPOTENCY_KEY
        )
    authorization = request.headers.get("authorization", "") if not admission.is_open else ""
    return AdminCall(caller=admission.principal.name, authorization=authorization, key=key)


def _told(error: LoraplexError, call: AdminCall) -> LoraplexError:
    """Return an error of the store, in the words of the call."""
    if error.field == "request_id":
        return InvalidParameterError(
            "this Idempotency-Key was used for another call; draw a new one", field=IDEMPOTENCY_KEY
        )
    if call.authorization or not isinstance(error, RoleForbiddenError | UnauthenticatedError):
        return error
    return RoleForbiddenError(
        f"the adapter store takes this from administrators it knows by their key, and the request came without one: {error.message}"
    )
