"""How tensor-parallel ranks divide an adapter's pairs among themselves in one fused projection of a step, and which way is faster.

                column-parallel (q, k, v, gate, up)                row-parallel (o, down)
    WHOLE       A whole, B by outputs; nothing is sent             A by inputs, B whole; nothing is sent
    DIVIDED     A by its rank rows, B by outputs; ``A x`` gathered   A by inputs, B by outputs; ``A x`` summed up

Either way the delta is in a rank's part of the outputs, or in its partial sums before the base's all-reduce. The images of the ranks
are the same for both: a rank that divides a whole factor reads its part of it.

Source: Sheng et al., "S-LoRA", arXiv:2311.03285, section 5 (DIVIDED).
"""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass
from typing import Final

from loraplex_common.projections import Split

H_BYTES: Final = 4
"""Bytes of a number of ``A x`` as ranks send it: fp32."""


class PairSplit(enum.Enum):
    """What ranks do with the factor of a pair that each of them has whole."""

    WHOLE = "whole"
    DIVIDED = "divided"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRates:
    """What the choice depends on besides the step.

    Attributes:
        link_bytes_per_s: What a rank sends to another.
        latency_s: A collective of a few bytes, in seconds.
        read_bytes_per_s: What a rank reads of its memory.
        flops_per_s: What it multiplies and adds, in operations per second.
    """

    link_bytes_per_s: float
    latency_s: float
    read_bytes_per_s: float
    flops_per_s: float


CPU_RATES: Final = RankRates(link_bytes_per_s=1.4e9, latency_s=300e-6, read_bytes_per_s=24e9, flops_per_s=80e9)
"""Two ranks over gloo on the loopback with a core each: an all-reduce of 64 B takes 0.3 ms, of 1 MiB 0.8, of 4 MiB 4.8.

They are constants, as the choice is part of the numerics: engines of one fleet have to make the same one.
"""


def choice_named(name: str) -> PairSplit | RankRates:
    """Return the choice that ``--adapter-split`` names: a `PairSplit`, or ``auto`` for the faster one."""
    return CPU_RATES if name == "auto" else PairSplit(name)


def choice_text(choice: PairSplit | RankRates) -> str:
    """Encode how ranks are to choose."""
    return choice.value if isinstance(choice, PairSplit) else json.dumps(asdict(choice))


def choice_of(text: str) -> PairSplit | RankRates:
    """Decode what `choice_text` wrote."""
    return RankRates(**json.loads(text)) if text.startswith("{") else PairSplit(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLoad:
    """The pairs of one step in one fused projection of one layer.

    Attributes:
        split: How ranks divide the projection itself.
        degree: Ranks.
        factor_bytes: Bytes of the factors that `PairSplit.WHOLE` has each rank read whole, of all the step's adapters together.
        products: Pairs of a token and a number of such a factor of its adapter.
        h_size: Pairs of a token and a rank of its adapter: numbers of ``A x``.
    """

    split: Split
    degree: int
    factor_bytes: int
    products: int
    h_size: int

    def whole_s(self, rates: RankRates) -> float:
        """Return the seconds that whole factors take."""
        return max(self.factor_bytes / rates.read_bytes_per_s, 2 * self.products / rates.flops_per_s)

    def divided_s(self, rates: RankRates) -> float:
        """Return the seconds that a rank's part of them and its collective take, both as rings."""
        passes = 2 if self.split is Split.INPUTS else 1
        moved = passes * (self.degree - 1) / self.degree * self.h_size * H_BYTES
        return self.whole_s(rates) / self.degree + rates.latency_s + moved / rates.link_bytes_per_s

    def faster(self, rates: RankRates) -> PairSplit:
        """Return the faster way; the one without a collective if both take as long."""
        return PairSplit.DIVIDED if self.divided_s(rates) < self.whole_s(rates) else PairSplit.WHOLE


def share(size: int, rank: int, degree: int) -> tuple[int, int]:
    """Return a rank's part ``[first, last)`` of so many rank rows or outputs; the last ranks may have fewer, or none."""
    each = -(-size // degree)
    return min(rank * each, size), min((rank + 1) * each, size)
