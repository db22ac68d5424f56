"""How the kernel of LoRA at prefill is compiled, by the ranks that it takes: the macros of csrc/lora/prefill.cu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_image import TILE_BYTES
from loraplex_common.low_rank import MAX_SLICES

from loraplex_kernels.lora.tables import MAX_STACKED_RANK, PLAIN_MAX_RANK

if TYPE_CHECKING:
    from loraplex_kernels.lora.items import OpShape

SM_SHARED_BYTES: Final = 228 * 1024  # of an H100's SM; each CTA takes 1 KiB more than it asks for
CTAS_PER_SM: Final = 3  # with the shortest ring
TILE_TOKENS: Final = 64  # kTokens
RANK_BLOCK: Final = 64  # kStep
WHOLE_STEPS: Final = TILE_BYTES // 128
"""Stacked rank up to which a tile of A holds the 64 columns of a step; above it 32, 16 or 8."""
NARROW_STACKED_RANK: Final = MAX_SLICES * PLAIN_MAX_RANK
RANK_CLASSES: Final = (16, 32, 64, PLAIN_MAX_RANK, NARROW_STACKED_RANK, MAX_STACKED_RANK)
"""Classes with a kernel each: by a slice's largest rank; the last but one is for stacked ranks above `WHOLE_STEPS`, the last for
those above `NARROW_STACKED_RANK` and ranks above `PLAIN_MAX_RANK`."""
WIDE_SHARED_BYTES: Final = 160 * 1024
"""Shared memory of a CTA of the last class, which has a multiprocessor to itself; one of sm_80 has 163 KiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """How the kernel is cut; the macros of csrc/lora/prefill.cu.

    Attributes:
        cluster: CTAs of a work item.
        table: Most steps of 64 columns, and chunks of 64 outputs, of a CTA.
        ranks: Most rank rows of a block: 16, 32 or 64.
        blocks: Most blocks of 64 rank rows of a slice.
        parts: Parts of a step's columns, each within one tile of A; 8 for the last class.
        ctas_per_sm: CTAs that share a multiprocessor's shared memory.
    """

    cluster: int
    table: int
    ranks: int = RANK_BLOCK
    blocks: int = 1
    parts: int = 1
    ctas_per_sm: int = CTAS_PER_SM

    @classmethod
    def of(cls, cluster: int, ranks: int, shapes: tuple[OpShape, ...], ctas_per_sm: int) -> Shape:
        """Return the shape for a class of `RANK_CLASSES` of a model's ops."""
        return cls(
            cluster=cluster,
            table=table_size(shapes, cluster),
            ranks=min(ranks, RANK_BLOCK),
            blocks=-(-min(ranks, PLAIN_MAX_RANK) // RANK_BLOCK),
            parts=8 if ranks > NARROW_STACKED_RANK else 4 if ranks > PLAIN_MAX_RANK else 1,
            ctas_per_sm=ctas_per_sm,
        )

    @property
    def is_wide(self) -> bool:
        """Whether it is the last class, whose items are halves of a slice's rank."""
        return self.parts == 8

    @property
    def stages(self) -> int:
        """Slots of the ring: shared memory left with as many CTAs per SM as registers allow, one fewer above 64."""
        if self.is_wide:
            return (WIDE_SHARED_BYTES - self._fixed_bytes) // self._slot_bytes
        ctas = self.ctas_per_sm if self.blocks == 1 else min(self.ctas_per_sm, CTAS_PER_SM - 1)
        return (SM_SHARED_BYTES // ctas - 1024 - self._fixed_bytes) // self._slot_bytes

    @property
    def shared_bytes(self) -> int:
        """Size of the kernel's struct Shared, in bytes."""
        return -(-(self.stages * self._slot_bytes + self._fixed_bytes) // 8) * 8

    @property
    def _slot_bytes(self) -> int:
        return 128 * (TILE_TOKENS + self.ranks)

    @property
    def _fixed_bytes(self) -> int:
        """Bytes of partial sums, h, tables, scales and mbarriers."""
        exchanged = TILE_TOKENS * (4 * self.ranks + 128 * self.blocks + 4) + 16 * self.blocks
        return exchanged + (8 * (1 + self.is_wide) + 12 * self.parts) * self.table

    @property
    def defines(self) -> tuple[str, ...]:
        """The kernel's macros."""
        values = {
            "CLUSTER": self.cluster,
            "RANKS": self.ranks,
            "BLOCKS": self.blocks,
            "STAGES": self.stages,
            "TABLE": self.table,
            "PARTS": self.parts,
            "SHARED_BYTES": self.shared_bytes,
        }
        return tuple(f"{name}={value}" for name, value in values.items())


def table_size(shapes: tuple[OpShape, ...], cluster: int) -> int:
    """Return the most steps of 64 columns, or chunks of 64 outputs, that a CTA has."""
    longest = max(max(shape.columns, *shape.outputs) for shape in shapes)
    return -(-longest // 64) // cluster + 1
