"""Log probabilities of a text's tokens, computed by the torch backend in fp32 over keys and values of any type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_engine.step import SlotSetup
from support.oracle import make_rig
from support.plans import Draw

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray


def logprobs_over(model_dir: Path, token_ids: Sequence[int], *, kv_dtype: str, chunk: int) -> NDArray[np.float64]:
    """Return the log probability of each token but the first, ``[tokens - 1]``.

    Args:
        model_dir: The base model.
        token_ids: A text.
        kv_dtype: Type of keys and values, as `PoolGeometry` has it.
        chunk: Tokens of a step.
    """
    length = len(token_ids)
    rig = make_rig(model_dir, num_pages=length // 16 + 4, max_num_seqs=2, max_model_len=length + 2, kv_dtype=kv_dtype)
    none = np.empty(0, np.int32)
    setup = SlotSetup(slot=0, prompt_token_ids=none, output_token_ids=none, prompt_logprobs=1)
    sequence = rig.harness.add(
        list(token_ids), draw=Draw(num_logprobs=1), setup=setup, chunks=[chunk] * (length // chunk)
    )
    rig.harness.generate([sequence], 1)
    rig.runner.close()
    found = np.array([entry.logprobs[0] for entry in sequence.prompt_logprobs], dtype=np.float64)
    if len(found) != length - 1:
        raise AssertionError(f"{len(found)} log probabilities of {length} tokens")
    return found
