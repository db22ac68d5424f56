"""The exception tree of loraplex.

One class per row of the error table in docs/errors.md: gRPC code, reason, HTTP status and retry advice are class
attributes, so raising the right class is all a caller does. `error_status` has their form on the wire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.quota_failure import ExceededLimit


class LoraplexError(Exception):
    """A failure that the contract defines.

    Args:
        message: What is wrong and how to correct it, for people to read.
        retry_after_s: Earliest useful retry; sent as `RetryInfo`.
        metadata: Facts for programs, sent in `ErrorInfo.metadata`.
        field: The offending request field, sent as a `BadRequest` violation.
        violations: All offending fields as (field, what is wrong), if there are several; replaces `field`.
        drop_reason: Value of the trailer `loraplex-drop-reason`, if the request was shed.

    Attributes:
        code: gRPC status code.
        reason: Stable upper-case identifier.
        http_status: Status on the OpenAI-compatible port. OpenAI's clients send a request again for 408, 409, 429 and
                from 500 on, so a final refusal must have another status.
        is_retryable: Whether the same request may succeed later or elsewhere.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    is_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        metadata: dict[str, str] | None = None,
        field: str | None = None,
        violations: Sequence[tuple[str, str]] = (),
        drop_reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.metadata = metadata or {}
        self.violations = tuple(violations) or (((field, message),) if field is not None else ())
        self.field = self.violations[0][0] if self.violations else None
        self.drop_reason = drop_reason


class InvalidParameterError(LoraplexError):
    """A request field has a value that cannot be served; `field` names it."""

    code, reason, http_status = grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER", 400


class ContextLengthError(InvalidParameterError):
    """Prompt and output are longer than the model's longest sequence; the message has the arithmetic."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class AdapterNotFoundError(LoraplexError):
    """Unknown adapter, revision or alias."""

    code, reason, http_status = grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", 404


class ModelNotFoundError(LoraplexError):
    """No engine of this base model is known."""

    code, reason, http_status = grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", 404


class AdapterLoadingError(LoraplexError):
    """The request has FAIL_FAST and its adapter is still on its way."""

    code, reason, http_status, is_retryable = grpc.StatusCode.UNAVAILABLE, "ADAPTER_LOADING", 503, True


class AdapterIncompatibleError(LoraplexError):
    """Rank, module, shape or base model do not fit; the message names the tensor or setting."""

    code, reason, http_status = grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_INCOMPATIBLE", 422


class AdapterUntrustedError(LoraplexError):
    """The adapter's files are not signed by a signer that the operator trusts; the message has the remedy."""

    code, reason, http_status = grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_UNTRUSTED", 422


class AdapterInUseError(LoraplexError):
    """Refused while running requests lease the adapter; `force` overrides."""

    code, reason, http_status, is_retryable = grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_IN_USE", 409, True


class AdapterCorruptUploadError(LoraplexError):
    """The caller sent something that is not a sound checkpoint."""

    code, reason, http_status = grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_CORRUPT", 400


class AdapterCorruptError(LoraplexError):
    """Bytes in the store or an engine do not match their digest."""

    code, reason, http_status = grpc.StatusCode.DATA_LOSS, "ADAPTER_CORRUPT", 500


class UnauthenticatedError(LoraplexError):
    """No or bad credentials."""

    code, reason, http_status = grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", 401


class AdapterForbiddenError(LoraplexError):
    """The caller's role may not do this. An adapter that it may not use is `AdapterNotFoundError`: names are secrets."""

    code, reason, http_status = grpc.StatusCode.PERMISSION_DENIED, "ADAPTER_FORBIDDEN", 403


class RoleForbiddenError(LoraplexError):
    """The caller's role may not make this call, or not for another's resource; metadata: role, RPC and roles needed."""

    code, reason, http_status = grpc.StatusCode.PERMISSION_DENIED, "ROLE_FORBIDDEN", 403


class PriorityForbiddenError(LoraplexError):
    """The request asks for a class of service above what its caller's credential allows."""

    code, reason, http_status = grpc.StatusCode.PERMISSION_DENIED, "PRIORITY_FORBIDDEN", 403


class ConflictError(LoraplexError):
    """Stale etag, generation or expected revision: read again."""

    code, reason, http_status, is_retryable = grpc.StatusCode.ABORTED, "CONFLICT", 409, True


class AlreadyExistsError(LoraplexError):
    """The name is taken, or another call has used the request_id."""

    code, reason, http_status = grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS", 400


class RequestRunningError(LoraplexError):
    """A request with this id is still running."""

    code, reason, http_status, is_retryable = grpc.StatusCode.ALREADY_EXISTS, "REQUEST_RUNNING", 409, True


class TenantQuotaError(LoraplexError):
    """The tenant has used up its quota.

    Without `retry_after_s` no retry helps: the quota allows nothing, or never so much at once.

    Args:
        message: The same as for every error.
        exceeded: Each limit that is exceeded, with the amount used; sent as `QuotaFailure`.
        keywords: The same as for every error.
    """

    code, reason, http_status, is_retryable = grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_QUOTA", 429, True

    def __init__(self, message: str, *, exceeded: Sequence[ExceededLimit] = (), **keywords: Any) -> None:
        super().__init__(message, **keywords)
        self.exceeded = tuple(exceeded)
        self.is_retryable = self.retry_after_s is not None  # type: ignore[misc]


class SaturatedError(LoraplexError):
    """Queues are full."""

    code, reason, http_status, is_retryable = grpc.StatusCode.RESOURCE_EXHAUSTED, "SATURATED", 429, True


class QueueTimeoutError(LoraplexError):
    """queue_timeout passed before the request got a place in a batch."""

    code, reason, http_status, is_retryable = grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_TTL", 429, True


class SloUnreachableError(LoraplexError):
    """The request was ended early because it could not have met its objective."""

    code, reason, http_status, is_retryable = grpc.StatusCode.RESOURCE_EXHAUSTED, "SLO_UNREACHABLE", 429, True


class NoEngineError(LoraplexError):
    """No engine is ready."""

    code, reason, http_status, is_retryable = grpc.StatusCode.UNAVAILABLE, "NO_ENGINE", 503, True


class DrainingError(LoraplexError):
    """This server is shutting down; try another."""

    code, reason, http_status, is_retryable = grpc.StatusCode.UNAVAILABLE, "DRAINING", 503, True


class StoreUnavailableError(LoraplexError):
    """The adapter store or its Valkey cannot be reached."""

    code, reason, http_status, is_retryable = grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", 503, True


class DeadlineError(LoraplexError):
    """The caller's deadline passed."""

    code, reason, http_status = grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE", 504


class StreamInterruptedError(LoraplexError):
    """The engine died mid-stream and the request could not be continued elsewhere."""

    code, reason, http_status, is_retryable = grpc.StatusCode.ABORTED, "STREAM_INTERRUPTED", 500, True


class ResumeInvalidError(LoraplexError):
    """A resume token is forged, foreign or too old, or its request does not fit it; `metadata` has the cause."""

    code, reason, http_status = grpc.StatusCode.INVALID_ARGUMENT, "RESUME_INVALID", 400


class RequestLostError(LoraplexError):
    """Each engine that this request was sent to was lost before it gave a token."""

    code, reason, http_status = grpc.StatusCode.INTERNAL, "REQUEST_LOST", 500


class EngineHungError(LoraplexError):
    """The engine's device or step loop makes no progress; its process ends."""

    code, reason, http_status, is_retryable = grpc.StatusCode.UNAVAILABLE, "ENGINE_HUNG", 503, True


class SlowConsumerError(LoraplexError):
    """The client or gateway did not read its stream."""

    code, reason, http_status = grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER", 499


class RequestTooLargeError(LoraplexError):
    """The request can never fit the page pool; the message has the arithmetic."""

    code, reason, http_status = grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_TOO_LARGE", 413


class EngineOomError(LoraplexError):
    """The device ran out of memory for this request."""

    code, reason, http_status, is_retryable = grpc.StatusCode.RESOURCE_EXHAUSTED, "ENGINE_OOM", 503, True


class SequenceGapError(LoraplexError):
    """The watch position is too old: list again."""

    code, reason, http_status, is_retryable = grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_GAP", 400, True


class CancelledRequestError(LoraplexError):
    """The caller went away."""

    code, reason, http_status = grpc.StatusCode.CANCELLED, "CANCELLED", 499


class NotSupportedError(LoraplexError):
    """Part of the contract that this build does not serve; the message says why."""

    code, reason, http_status = grpc.StatusCode.UNIMPLEMENTED, "NOT_SUPPORTED", 400


class RemoteError(LoraplexError):
    """A peer's status passed on unchanged; code, reason and HTTP status belong to the instance, not to the class."""

    is_retryable = True  # not known here: the status decides

    def __init__(self, message: str, *, code: grpc.StatusCode, reason: str, http_status: int, **keywords: Any) -> None:
        super().__init__(message, **keywords)
        self.code = code  # type: ignore[misc]
        self.reason = reason  # type: ignore[misc]
        self.http_status = http_status  # type: ignore[misc]
