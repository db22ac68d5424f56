"""Token ids of prompts."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def prompt_ids(workload: int, request: int, prompt_tokens: int, *, vocab_size: int = 32000) -> NDArray[np.int32]:
    """Return a request's prompt: random ids that depend on nothing but these arguments.

    Args:
        workload: Place of the workload in its run.
        request: Index of the request in its trace.
        prompt_tokens: Length.
        vocab_size: Ids are drawn from ``[10, vocab_size - 10)``.
    """
    seed = zlib.crc32(f"m{workload}/{request}".encode()) & 0x7FFFFFFF
    ids = np.random.RandomState(seed).randint(10, vocab_size - 10, prompt_tokens)
    return ids.astype(np.int32)
