"""How products of few rows are cut: the macros of csrc/products/fp8_product.cu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GROUPS_MACRO: Final = "GROUPS"
GATED_MACRO: Final = "GATED"
DENSE_MACRO: Final = "DENSE"
STEP: Final = 128
"""Bytes of a row's inputs in a step of the ring; inputs of a group that has a scale."""
GROUP_OUTPUTS: Final = 64  # of a warpgroup
ROW_CLASSES: Final = (8, 16, 32, 64, 128)
"""Rows that a kernel computes; a product takes the first class that holds its rows."""
WIDE_MAX_ROWS: Final = 64
"""Most rows of products so wide that tensor cores are what is short above; torch's are as fast there."""
DENSE_MAX_ROWS: Final = 64
"""Most rows of bf16 products whose tiles two CTAs share; of others half as many."""
SHARED_BYTES: Final = {1: 227 * 1024, 2: 113 * 1024}
"""Shared memory of a CTA of sm_90, by the CTAs of a multiprocessor."""
MAX_STAGES: Final = 24  # enough for any latency


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One way to cut a product.

    Attributes:
        rows: One of `ROW_CLASSES`.
        warpgroups: 64 outputs of a cluster each.
        parts: Warpgroups that take turns at the same outputs, a step of 128 inputs each.
        cluster: CTAs that share the inputs.
        stages: Steps that are on their way at once: a multiple of ``parts``, so that a part finds its steps in slots of its
            own. Copies land in any order, and a slot's turn can be told from the next one alone.
        ctas: CTAs that share a multiprocessor.

    Raises:
        ValueError: ``stages`` are not a multiple of ``parts``.
    """

    rows: int
    warpgroups: int
    parts: int
    cluster: int
    stages: int
    ctas: int

    def __post_init__(self) -> None:
        if self.stages % self.parts:
            raise ValueError(f"{self.stages} stages are not a multiple of {self.parts} parts")

    @classmethod
    def filling(cls, *, rows: int, warpgroups: int, parts: int, cluster: int, ctas: int) -> Cut:
        """Return the cut with as many stages as the shared memory holds."""
        cut = cls(rows=rows, warpgroups=warpgroups, parts=parts, cluster=cluster, stages=parts, ctas=ctas)
        each = (cut.outputs + rows) * STEP + 4 * rows + 16
        rest = 4 * (rows + 2 * cut.outputs) + 1024  # the last kilobyte is rounded up
        stages = min(MAX_STAGES, (SHARED_BYTES[ctas] - rest) // each) // parts * parts
        return cls(rows=rows, warpgroups=warpgroups, parts=parts, cluster=cluster, stages=stages, ctas=ctas)

    @property
    def outputs(self) -> int:
        """Outputs of a cluster."""
        return GROUP_OUTPUTS * self.warpgroups

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * self.warpgroups * self.parts + 32

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a CTA."""
        ring = self.stages * (self.outputs + self.rows) * STEP
        sums = self.parts * self.rows * (self.outputs + 4) * 4
        scales = 4 * (self.rows * (self.stages + 1) + 2 * self.outputs)
        return -(-(max(ring, sums) + scales + 16 * self.stages) // 1024) * 1024

    @property
    def can_gate(self) -> bool:
        """Whether a CTA has warpgroups for gate and for up, and a warp a row's results."""
        return self.warpgroups in (2, 4)

    def defines(self, *, has_groups: bool, gate: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Return the kernel's macros; arguments as of `Fp8Product`."""
        sizes = (
            f"ROWS={self.rows}",
            f"WARPGROUPS={self.warpgroups}",
            f"PARTS={self.parts}",
            f"CLUSTER={self.cluster}",
            f"STAGES={self.stages}",
            f"CTAS={self.ctas}",
        )
        gated = () if gate is None else (GATED_MACRO, *gate)
        return (*sizes, *(GROUPS_MACRO,) * has_groups, *gated)


def dense_cuts(outputs: int, num_sms: int) -> tuple[Cut, ...]:
    """Return the cuts of a bf16 weight's products, as `choose_cuts`: with fewer rows, where cuBLAS is as fast above (ADR 57)."""
    most = DENSE_MAX_ROWS if -(-outputs // GROUP_OUTPUTS) <= num_sms // 2 else DENSE_MAX_ROWS // 2
    return tuple(cut for cut in choose_cuts(outputs, num_sms) if cut.rows <= most)


def choose_cuts(outputs: int, num_sms: int) -> tuple[Cut, ...]:
    """Return the cuts of a weight's products, by rising rows; the last one's are the most that are worth it.

    All have as many parts and CTAs of a cluster, on which the order of sums depends: a row's result is the same in all of
    them. By T = tiles of 64 outputs and M multiprocessors, the fastest of those timed on an H200 for Llama-3-8B:

        [1, M/2]    two CTAs share a tile's inputs (o, down)
        (M/2, M]    a CTA a tile (qkv)
        (M, 2M]     the same, two on a multiprocessor
        (2M, inf)   wide (gate_up): larger tiles, so that the input is read less often, a warpgroup for each 64 outputs, and two CTAs
                    on a multiprocessor. At 64 rows one CTA of four warpgroups takes as long alone, but leaves 20 multiprocessors
                    of 132 idle and the gate behind it no registers: a whole step takes 45 us more.
    """
    tiles = -(-outputs // GROUP_OUTPUTS)
    if tiles > 2 * num_sms:
        rows_of_wide = [rows for rows in ROW_CLASSES if rows <= WIDE_MAX_ROWS]
        return tuple(Cut.filling(rows=rows, warpgroups=2, parts=1, cluster=1, ctas=2) for rows in rows_of_wide)
    cluster = 2 if tiles <= num_sms // 2 else 1
    return tuple(
        Cut.filling(
            rows=rows, warpgroups=1, parts=2, cluster=cluster, ctas=2 if tiles * cluster > num_sms and rows < 128 else 1
        )
        for rows in ROW_CLASSES
    )
