"""The layer around every call: authentication, the error table, metrics. Servicers just raise."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import grpc
from grpc_status import rpc_status

from loraplex_common.answer_by import answering_within
from loraplex_common.auth import Authenticator, Certificate, acting_as, current_principal
from loraplex_common.error_status import to_status
from loraplex_common.errors import AdapterLoadingError, LoraplexError
from loraplex_common.log import get_logger
from loraplex_common.request_arrival import RequestArrivals
from loraplex_common.rights import OPEN_SERVICES, RIGHTS, SCALER, require_right
from loraplex_common.running_calls import RunningCalls
from loraplex_common.undecodable import Undecodable, tolerant
from loraplex_common.unknown_fields import refuse_unknown_fields

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from loraplex_common.admissions import Admission
    from loraplex_common.auth import Role
    from loraplex_common.rpc_metrics import RpcMetrics

DROP_REASON_KEY: Final = "loraplex-drop-reason"
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"  # gRPC proposal A6: the server sets the time of a retry
DO_NOT_RETRY: Final = "-1"
# A client whose deadline passes ends at once; the server's own copy of the deadline, set on arrival, passes later.
DEADLINE_MARGIN_S: Final = 0.05
# A status is queued behind data that the client has not read yet; a client that reads nothing gets no status.
LAST_WORD_S: Final = 2.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs only

_log = get_logger()


class _Call:
    """One call; wraps the behaviour of a handler of any of the four shapes."""

    def __init__(self, method: str, authorization: str | None, server: LoraplexInterceptor) -> None:
        self._method = method
        self._authorization = authorization
        self._server = server
        self._admission: Admission | None = None
        self._status = ""
        self._is_strict = server.refuses_unknown_fields and not method.startswith((*OPEN_SERVICES, SCALER))

    def checked(self, request: Any) -> Any:
        """Return the request, or for a stream an iterator over it; refuses what cannot be read or would be dropped."""
        if hasattr(request, "__aiter__"):
            return self._checked_stream(request)
        if isinstance(request, Undecodable):
            raise request.error()
        if self._is_strict:
            refuse_unknown_fields(request)
        return request

    async def received(self, requests: AsyncIterator[Any], context: Context, *, is_stream: bool) -> Any:
        """Return the handler's argument: its one request once that has arrived, or for a stream an iterator."""
        if is_stream:
            return self.checked(requests)
        return self.checked(await self._server.arrivals.receive(context.read, tenant=current_principal().name))

    async def _checked_stream(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            yield self.checked(request)

    async def guard(self, context: Context, run: Callable[[], Awaitable[Any]]) -> Any:
        """Run a handler as its caller; turn its exception into a status; record the outcome."""
        metrics, label = self._server.metrics, self._method.lstrip("/")
        started = time.perf_counter()
        self._status = grpc.StatusCode.OK.name
        if metrics is not None:
            metrics.started(label)
        try:
            if self._method.startswith(OPEN_SERVICES):
                return await run()
            return await self._as_caller(context, run)
        except asyncio.CancelledError:
            await self._cancelled(context)
            raise
        except grpc.aio.AbortError:
            self._status = _status_name(context)
            raise
        except LoraplexError as error:
            failure = self._admission.error() if self._admission is not None and self._admission.has_lapsed else error
            self._status = failure.code.name
            await abort(context, failure)
        except Exception as error:
            if context.done():  # the client went away
                self._status = grpc.StatusCode.CANCELLED.name
                raise asyncio.CancelledError from error
            self._status = grpc.StatusCode.INTERNAL.name
            await abort(context, internal_error(self._method, error))
        finally:
            if metrics is not None:
                metrics.finished(label, self._status, time.perf_counter() - started)

    async def _as_caller(self, context: Context, run: Callable[[], Awaitable[Any]]) -> Any:
        self._admission = admission = self._server.admit(self._method, self._authorization, context)
        task = asyncio.current_task()
        assert task is not None
        with (
            self._server.running.count(context.peer()),
            admission.running(task.cancel),
            acting_as(admission.principal),
            answering_within(context.time_remaining()),
        ):
            return await run()

    async def _cancelled(self, context: Context) -> None:
        """Raise the reason if this server cancelled the call; returns if no answer can reach the client."""
        if self._admission is None or not self._admission.has_lapsed or context.done():
            remaining_s: float | None = context.time_remaining()
            is_late = remaining_s is not None and remaining_s <= DEADLINE_MARGIN_S
            self._status = (grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED).name
            return
        error = self._admission.error()
        self._status = error.code.name
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(abort(context, error), LAST_WORD_S)


class LoraplexInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates and authorises calls, maps exceptions to rich statuses, records metrics.

    Args:
        authenticator: Decides which callers are let in; None lets every caller in.
        metrics: Is told of calls.
        refuses_unknown_fields: Whether requests with fields that our protos do not have are refused.
        arrivals: Receives the requests.
        running: Calls whose callers have been recognised.
        rights: The calls that each role may make.
    """

    def __init__(
        self,
        *,
        authenticator: Authenticator | None,
        metrics: RpcMetrics | None,
        arrivals: RequestArrivals | None = None,
        refuses_unknown_fields: bool = False,
        rights: Mapping[str, frozenset[Role]] = RIGHTS,
    ) -> None:
        self._authenticator = authenticator or Authenticator()
        self._rights = rights
        self.metrics = metrics
        self.refuses_unknown_fields = refuses_unknown_fields
        self.arrivals = arrivals or RequestArrivals()
        self.running = RunningCalls()

    def admit(self, method: str, authorization: str | None, context: Context) -> Admission:
        """Return the caller's admission, if it may make this call.

        Raises:
            UnauthenticatedError: If the credentials are missing or unknown.
            RoleForbiddenError: If the caller's role does not have this right.
        """
        admission = self._authenticator.admit(authorization, certificate=_certificate(context))
        require_right(admission, method, self._rights)
        return admission

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        metadata = handler_call_details.invocation_metadata or ()
        authorization = next((str(value) for key, value in metadata if key == "authorization"), None)
        return _wrap(handler, _Call(handler_call_details.method, authorization, self))


def _certificate(context: Context) -> Certificate | None:
    """Return the names in the client's certificate; None if it has shown none."""
    properties = context.auth_context()
    common_names = properties.get("x509_common_name", ())
    alternative_names = properties.get("x509_subject_alternative_name", ())
    if not common_names and not alternative_names:
        return None
    return Certificate(
        common_name=next((name.decode() for name in common_names), ""),
        alternative_names=tuple(name.decode(errors="replace") for name in alternative_names),
    )


def _wrap(handler: Handler, call: _Call) -> Handler:
    """Return a handler of the same shape whose behaviour goes through ``call``."""
    inner: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    is_stream = bool(handler.request_streaming)

    async def respond_once(requests: Any, context: Context) -> Any:
        async def run() -> Any:
            return await inner(await call.received(requests, context, is_stream=is_stream), context)

        return await call.guard(context, run)

    async def respond_with_stream(requests: Any, context: Context) -> None:
        async def run() -> None:
            request = await call.received(requests, context, is_stream=is_stream)
            # Closed here and now, not by the garbage collector: the generator's `finally` releases leases and pages.
            async with aclosing(inner(request, context)) as messages:
                async for message in messages:
                    await context.write(message)

        await call.guard(context, run)

    # On the wire one request and a stream of one are the same; `request_arrival` says why all are streams here.
    make, behaviour = (
        (grpc.stream_stream_rpc_method_handler, respond_with_stream)
        if handler.response_streaming
        else (grpc.stream_unary_rpc_method_handler, respond_once)
    )
    wrapped: Handler = make(
        behaviour,
        request_deserializer=tolerant(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )
    return wrapped


def _status_name(context: Context) -> str:
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    return next((known.name for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.UNKNOWN.name)


def internal_error(method: str, error: Exception) -> LoraplexError:
    """Log an unexpected exception and return the error for the caller: an id by which the log line is found."""
    error_id = uuid.uuid4().hex[:12]
    _log.error("unexpected error in a call", method=method, error_id=error_id, exc_info=error)
    return LoraplexError(f"internal error {error_id}: see the server's log", metadata={"error_id": error_id})


def trailers(error: LoraplexError, remaining_s: float | None = None) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata of an error besides its status.

    Args:
        error: The error.
        remaining_s: Time left for the call; None if it has no limit.
    """
    result: list[tuple[str, str]] = []
    if error.drop_reason is not None:
        result.append((DROP_REASON_KEY, error.drop_reason))
    is_too_late = remaining_s is not None and error.retry_after_s is not None and error.retry_after_s >= remaining_s
    if isinstance(error, AdapterLoadingError) or is_too_late:
        # FAIL_FAST: the caller decides whether to retry (RetryInfo says when); its channel must not wait for that. The
        # channel must not wait for a retry after the deadline either: the caller would only learn that its deadline
        # passed.
        result.append((PUSHBACK_KEY, DO_NOT_RETRY))
    elif error.retry_after_s is not None:
        result.append((PUSHBACK_KEY, str(max(1, round(error.retry_after_s * 1000)))))
    return tuple(result)


async def abort(context: Context, error: LoraplexError) -> None:
    """End a call with an error's rich status; never returns."""
    status = rpc_status.to_status(to_status(error))
    metadata = (
        *(context.trailing_metadata() or ()),
        *status.trailing_metadata,
        *trailers(error, context.time_remaining()),
    )
    # gRPC keeps the exception raised here with the call, and its frames keep the call. The request, perhaps megabytes,
    # would stay with them until a full garbage collection.
    error.__traceback__ = None
    try:
        await context.abort(status.code, status.details, metadata)
    except grpc.aio.AbortError as aborted:
        aborted.__context__ = None
        raise
