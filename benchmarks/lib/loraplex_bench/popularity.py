"""Which adapter each row of a batch has, in the baselines' patterns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def baseline_adapters(rows: int, popularity: str) -> NDArray[np.int32]:
    """Return the baselines' adapter of each row, numbered by size of the drawn index.

    Args:
        rows: Batch size.
        popularity: ``same``, ``distinct`` or ``zipf`` (weight 1/rank over as many adapters as rows).
    """
    generator = torch.Generator().manual_seed(rows * 7919 + 13)
    if popularity == "same":
        return np.zeros(rows, dtype=np.int32)
    if popularity == "distinct":
        return torch.randperm(rows, generator=generator).numpy().astype(np.int32)
    weights = 1.0 / torch.arange(1, rows + 1)
    drawn = torch.multinomial(weights, rows, replacement=True, generator=generator).numpy()
    return np.unique(drawn, return_inverse=True)[1].astype(np.int32)
