"""One line in the log for each change of an adapter: what was asked, the caller, and how it ended."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.auth import current_principal
from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = get_logger()
DONE: Final = "OK"
BROKEN_OFF: Final = "BROKEN_OFF"
"""Outcome of a change whose call was cancelled, or that ended with a bug: it may or may not be made."""


@contextmanager
def audited(action: str, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Write the line of a change once the block ends, at level info, which no bound on similar lines drops.

    Args:
        action: What the caller asks for: ``import``, ``push``, ``create``, ``update``, ``delete``, ``alias``, ...
        name: The adapter.
        facts: What is known before.

    Yields:
        The facts, for what is found out inside the block: revision, source, labels.
    """
    caller, outcome = current_principal(), BROKEN_OFF
    try:
        yield facts
        outcome = DONE
    except LoraplexError as error:
        outcome = error.reason
        raise
    finally:
        _log.info(
            "audit", action=action, name=name, caller=caller.name, role=caller.role.value, outcome=outcome, **facts
        )
