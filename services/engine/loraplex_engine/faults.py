"""What goes wrong with one request ends that one: it is told an error id, the log tells the rest, all others go on.

Wherever the engine does something for one request (takes it in, seats it, cuts its chunk, reads its result, encodes its
news), an exception is that request's. Only what cannot be laid to one of them ends the step loop.
"""

from __future__ import annotations

import uuid

from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger

_log = get_logger()


def internal_error(doing: str, error: BaseException, **facts: object) -> LoraplexError:
    """Log an unexpected error under a new id, and return what its request is told: the id, none of the internals.

    Args:
        doing: When it happened, as a clause: ``while its prompt was read``.
        error: What was raised.
        facts: More for the log.
    """
    error_id = uuid.uuid4().hex[:12]
    _log.error("a request failed by an error of the engine", error_id=error_id, doing=doing, exc_info=error, **facts)
    return LoraplexError(f"internal error {error_id} {doing}: see the engine's log", metadata={"error_id": error_id})
