"""How many CTAs the LoRA kernels of decode steps get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SHRINK_CTAS_PER_SM: Final = 3  # what fits at 80 registers x 256 threads
EXPAND_CTAS_PER_SM: Final = 6  # kCtasPerSm: at 80 registers x 128 threads
CHAIN_CTAS_PER_SM: Final = 4  # of lora/expand_chain.cu: at 128 registers x 128 threads
CTAS_PER_ROW: Final = 64
TERMS_PER_ROW: Final = 3  # that a graph of chains has CTAs for


@dataclass(frozen=True, slots=True)
class Grids:
    """CTAs of the LoRA kernels in a graph, which must do for any adapters of its rows.

    No more than there is room for at a time, and no more than few rows can have work for: a CTA without work still needs
    a place on a multiprocessor, which a product beside it may hold to its end.
    """

    shrink: int
    expand: int

    @classmethod
    def of(cls, rows: int, num_sms: int, *, is_chained: bool = False) -> Grids:
        """Return the grids of a graph with that many rows, which have several adapters each if ``is_chained``."""
        few = rows * CTAS_PER_ROW * (TERMS_PER_ROW if is_chained else 1)
        expand = CHAIN_CTAS_PER_SM if is_chained else EXPAND_CTAS_PER_SM
        return cls(min(SHRINK_CTAS_PER_SM * num_sms, few), min(expand * num_sms, few))
