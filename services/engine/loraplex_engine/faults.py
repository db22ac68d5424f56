"""A fault of one request ends that request only: its client gets an error id, the log the details, all others go on.

Wherever the engine works for one request (takes it in, seats it, cuts its chunk, reads its result, encodes its
outputs), an exception is that request's fault. Only an exception that cannot be traced to one request ends the step
loop.
"""

from __future__ import annotations

import uuid

from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger

_log = get_logger()


def internal_error(doing: str, error: BaseException, **facts: object) -> LoraplexError:
    """Log an unexpected error under a new id, and return the error for the request, which names only the id.

    Args:
        doing: When the error happened, as a clause: ``while its prompt was read``.
        error: The exception.
        facts: More facts for the log.
    """
    error_id = uuid.uuid4().hex[:12]
    _log.error("a request failed by an error of the engine", error_id=error_id, doing=doing, exc_info=error, **facts)
    return LoraplexError(f"internal error {error_id} {doing}: see the engine's log", metadata={"error_id": error_id})
