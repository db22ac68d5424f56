"""Which parts besides pairs a batch needs computed, and the graphs that there are for them.

Every kernel of a graph costs a launch in every op, adapted or not, so a batch of DoRA adapters is not sent through a graph
that also scales inputs and multiplies sparse deltas. Batches that mix what the small variants have take the last one.

FLoRA has no graph: how many passes over which projections' W a batch needs follows from its adapters, and a graph would make
the most that its rows can have, eight over each projection for each row. Such a step launches its kernels one by one, as steps
with prompts do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.flora import FLORA
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR

if TYPE_CHECKING:
    import numpy as np
    from loraplex_kernels.lora.tables import AdapterTables
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class PartVariant:
    """What is computed in an op besides the base's product.

    Attributes:
        has_pairs: Low-rank pairs.
        scales_inputs: The factor e on inputs.
        finishes: The factor c on outputs, and the bias b.
        has_sparse: Sparse deltas.
        has_flora: FLoRA, in steps without a graph.
    """

    has_pairs: bool = False
    scales_inputs: bool = False
    finishes: bool = False
    has_sparse: bool = False
    has_flora: bool = False

    def serves(self, needed: PartVariant) -> bool:
        """Tell whether everything that a batch needs is computed."""
        return (
            self.has_pairs >= needed.has_pairs
            and self.scales_inputs >= needed.scales_inputs
            and self.finishes >= needed.finishes
            and self.has_sparse >= needed.has_sparse
            and self.has_flora >= needed.has_flora
        )


PART_VARIANTS: Final = (
    PartVariant(has_pairs=True, finishes=True),  # DoRA, LoRA with biases
    PartVariant(scales_inputs=True, finishes=True),  # (IA)3, biases alone
    PartVariant(has_sparse=True),  # SHiRA
    PartVariant(has_pairs=True, scales_inputs=True, finishes=True, has_sparse=True),
)
"""The variants that graphs are captured of, smallest first; the last serves any mix without FLoRA."""
NO_GRAPH: Final = -1
"""The variant of steps that no graph computes: with FLoRA, with rows of several adapters or ranks above `PLAIN_MAX_RANK` beside
parts other than pairs, or with more terms than the buffers hold."""


def needed_parts(tables: AdapterTables, used: NDArray[np.int32], op: int | slice = slice(None)) -> PartVariant:
    """Return what a batch needs.

    Args:
        tables: The resident adapters.
        used: int32; the batch's adapters, each at least once.
        op: An op's place among the geometry's; every op if unset.
    """
    has = tables.has_part
    return PartVariant(
        has_pairs=bool(tables.max_stacked[used, op].any()),
        scales_inputs=bool(has[IN_VECTOR][used, op].any()),
        finishes=bool(has[OUT_VECTOR][used, op].any() or has[BIAS][used, op].any()),
        has_sparse=bool(has[SPARSE_DELTA][used, op].any()),
        has_flora=bool(has[FLORA][used, op].any()),
    )


def part_variant_of(needed: PartVariant) -> int:
    """Return the place in `PART_VARIANTS` of the smallest that serves a batch; `NO_GRAPH` if none does."""
    return next((index for index, variant in enumerate(PART_VARIANTS) if variant.serves(needed)), NO_GRAPH)
