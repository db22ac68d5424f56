"""The store's span of an image that a request waits for, from the engine's want to the image's arrival there."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from loraplex_common import trace_names as names
from loraplex_common import tracing
from loraplex_common.errors import LoraplexError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_adapter_store.attach.transfer import Transfer


def begin_span(transfer: Transfer, traceparent: str) -> None:
    """Note that a request of a trace waits for the image; the first one's trace gets the span."""
    if traceparent and transfer.span is None:
        transfer.span = tracing.start(names.STORE_TRANSFER, parent=traceparent)


@contextmanager
def ending_span(transfer: Transfer, engine_id: str) -> Iterator[None]:
    """End the transfer's span, if it has got one, with the block."""
    reason: str | None = None
    try:
        yield
    except BaseException as error:
        reason = error.reason if isinstance(error, LoraplexError) else type(error).__name__
        raise
    finally:
        if transfer.span is not None:
            attributes = {names.REVISION: transfer.digest, names.ENGINE_ID: engine_id, names.ERROR_TYPE: reason}
            transfer.span.end(attributes, error=reason)
            transfer.span = None
