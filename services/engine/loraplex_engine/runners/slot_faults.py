"""Decides which slots of a step are at fault for an exception of the runner; see `faults`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from loraplex_common.log import get_logger

from loraplex_engine.faults import internal_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loraplex_common.errors import LoraplexError
    from numpy.typing import NDArray

T = TypeVar("T")
_log = get_logger()
SlotFaults = dict[int, "LoraplexError"]
"""Slot -> error that its request ends with."""


@contextmanager
def blaming(faults: SlotFaults, slots: Sequence[int], doing: str) -> Iterator[None]:
    """Record what the block raises as the fault of some slots, and go on.

    Raises:
        torch.AcceleratorError: If the device itself is broken, which is no request's fault.
    """
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception as error:
        failure = internal_error(doing, error, slots=list(slots))
        faults.update(dict.fromkeys(slots, failure))


def together_or_apart(
    rows: NDArray[np.int64],
    slots: NDArray[np.int32],
    compute: Callable[[NDArray[np.int64]], T],
    faults: SlotFaults,
    doing: str,
) -> list[T]:
    """Compute rows together; if that raises, compute each row alone, so that only rows which raise then fail.

    Args:
        rows: int64, not empty.
        slots: int32; each row's slot.
        compute: Called with some of the rows.
        faults: Gets the slots of rows that raise alone.
        doing: Text for `internal_error`: what was being done.

    Raises:
        torch.AcceleratorError: If the device itself is broken.
    """
    try:
        return [compute(rows)]
    except torch.AcceleratorError:
        raise
    except Exception as error:
        _log.warning("rows are computed one by one", doing=doing, exc_info=error)
        parts: list[T] = []
        for row in rows:
            with blaming(faults, [int(slots[row])], doing):
                parts.append(compute(np.array([row], dtype=np.int64)))
        return parts
