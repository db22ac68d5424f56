"""Reads request bodies: as much memory as has arrived, no longer than a body that keeps coming takes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import (
    CancelledRequestError,
    DeadlineError,
    LoraplexError,
    SaturatedError,
)
from starlette.requests import ClientDisconnect

from loraplex_gateway.openai.errors import BodyTooLongError, ContentEncodingError, TransferCodingError
from loraplex_gateway.openai.http_protocol import AS_IT_IS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.datastructures import Headers
    from starlette.requests import Request

MIB: Final = 1024 * 1024
MAX_BODY_BYTES: Final = 4 * MIB  # as a gRPC message
# Every body may have these: the number of connections bounds them. What is beyond them comes out of one budget.
FREE_BYTES: Final = 64 * 1024
BUDGET_BYTES: Final = 64 * MIB
# A body has this long, and longer by what has come of it.
GRACE_S: Final = 10.0
MIN_BYTES_PER_S: Final = 32 * 1024
TOO_LONG: Final = f"the body is longer than {MAX_BODY_BYTES} bytes, the most that is read"
RETRY_S: Final = 1.0
LINGER_S: Final = 1.0
LINGER_BYTES: Final = 16 * MIB


class BodyReader:
    """Reads bodies, with one budget for all of them, of which no tenant gets more than half.

    Args:
        budget_bytes: What large bodies may hold at once.
        grace_s: How long a body may take, besides a second for every `MIN_BYTES_PER_S` that have come.
        on_large_gone: Called whenever a body is dropped that took from the budget.
    """

    def __init__(
        self,
        *,
        budget_bytes: int = BUDGET_BYTES,
        grace_s: float = GRACE_S,
        on_large_gone: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_large_gone = on_large_gone
        self._budget_bytes = budget_bytes
        self._held: dict[str, int] = {}  # by tenant
        self._grace_s = grace_s

    @asynccontextmanager
    async def read(self, request: Request, *, tenant: str) -> AsyncIterator[bytes]:
        """Hold a whole body.

        Raises:
            ContentEncodingError: If it is encoded.
            TransferCodingError: If it comes in another form than in chunks.
            BodyTooLongError: If it is too long, by what it announces or by what comes.
            DeadlineError: If it comes too slowly.
            CancelledRequestError: If the client goes away, or what it sends is no HTTP.
            SaturatedError: If too many bytes of other bodies are here; it may be sent again.
        """
        body = bytearray()
        num_charged = 0
        try:
            _check_form(request.headers)
            async for chunk in self._chunks(request):
                body += chunk
                wanted = max(0, len(body) - FREE_BYTES)
                self._charge(tenant, wanted - num_charged)
                num_charged = wanted
        except LoraplexError:
            if body or "expect" not in request.headers:  # otherwise the client waits to hear whether to send
                await _linger(request)
            raise
        else:
            yield bytes(body)
        finally:
            self._charge(tenant, -num_charged)
            if num_charged:
                self._on_large_gone()

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if something is held although no body is."""
        if self._held:
            raise RuntimeError(f"bodies hold {self._held} bytes")

    async def _chunks(self, request: Request) -> AsyncIterator[bytes]:
        num_bytes, began_at = 0, asyncio.get_running_loop().time()
        stream = request.stream()
        while True:
            deadline = began_at + self._grace_s + num_bytes / MIN_BYTES_PER_S
            try:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(stream)
            except StopAsyncIteration:
                return
            except ClientDisconnect:
                raise CancelledRequestError("the client went away before its body had come") from None
            except TimeoutError:
                raise DeadlineError(
                    f"the body came too slowly: {num_bytes} bytes in "
                    f"{asyncio.get_running_loop().time() - began_at:.0f} s"
                ) from None
            num_bytes += len(chunk)
            if num_bytes > MAX_BODY_BYTES:
                raise BodyTooLongError(TOO_LONG, field="body")
            yield chunk

    def _charge(self, tenant: str, num_bytes: int) -> None:
        held = self._held.get(tenant, 0) + num_bytes
        others = sum(self._held.values()) - self._held.get(tenant, 0)
        if num_bytes > 0 and (held > self._budget_bytes // 2 or held + others > self._budget_bytes):
            raise SaturatedError(
                "too many large request bodies arrive at once; send this one again",
                retry_after_s=RETRY_S,
                drop_reason="rejected-saturated",
            )
        if held:
            self._held[tenant] = held
        else:
            self._held.pop(tenant, None)


async def _linger(request: Request) -> None:
    """Read on for a moment, keeping nothing: a client in the middle of a write would see a reset instead of the reason."""
    num_bytes = 0
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(LINGER_S):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > LINGER_BYTES:
                    return


def _check_form(headers: Headers) -> None:
    """Refuse what a body's header announces and is not served."""
    encodings = ", ".join(headers.getlist("content-encoding"))
    if _codings(encodings) - {"identity"}:
        raise ContentEncodingError(
            f"Content-Encoding {encodings[:64]} is not served; send the body as it is, without that header",
            field="body",
        )
    codings = ", ".join(headers.getlist("transfer-encoding"))
    if _codings(codings) - {"chunked"}:
        raise TransferCodingError(f"Transfer-Encoding {codings[:64]} is not served; {AS_IT_IS}", field="body")
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:16]) > MAX_BODY_BYTES:
        raise BodyTooLongError(TOO_LONG, field="body")


def _codings(header: str) -> set[str]:
    return {coding for part in header.split(",") if (coding := part.strip().lower())}
