"""What loading does to a base model's numbers: two engines of one fingerprint compute alike only if this is equal, too.

A fingerprint says which files a base model has. What an engine computes also depends on what it makes of them: the type that
it computes in, whether quantised weights are unpacked or stay as they are, which weights it quantises itself, the type of keys
and values, and the table of positions where a model has several.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

WHOLE: Final = "whole"
"""Weights in the type that the engine computes in, as the files have them or rounded to it once."""
UNKNOWN: Final = ""
"""Numerics of an engine of an earlier version, which says none. It is equal to itself alone."""
SHORT_DTYPES: Final = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MAX_CHARS: Final = 128
_PART: Final = re.compile(r"[a-z0-9][a-z0-9._:-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """What an engine made of a base model's files; `str` has it for registry, answers and keys of cached blocks.

    The text begins with the type computed in; other parts follow behind ``+`` where they are not the plain case: ``bf16``,
    ``bf16+unpacked:awq``, ``bf16+fp8-w8a8-dynamic+kv:fp8``, ``bf16+tp:2``.

    Attributes:
        compute: torch's name of the type that activations and products have, e.g. ``bfloat16``.
        weights: `WHOLE`, or what was done to them in a short word, e.g. ``unpacked:awq`` or ``fp8-w8a8-dynamic``.
        kv: What keys and values are stored as, e.g. ``fp8``; empty: in the type computed in.
        rope: Which of several tables of positions is used, e.g. ``long``; empty where a model has one.
        tp_degree: Tensor-parallel ranks, whose partial sums are added in an order of their own.
        pairs: How these divide an adapter's pairs, ``whole`` or ``divided``; empty: as the faster way is.
    """

    compute: str
    weights: str = WHOLE
    kv: str = ""
    rope: str = ""
    tp_degree: int = 1
    pairs: str = ""

    def __post_init__(self) -> None:
        for part in (self.compute, self.weights, *filter(None, (self.kv, self.rope, self.pairs))):
            if not _PART.fullmatch(part):
                raise ValueError(f"{part!r} is no part of numerics: lower-case letters, digits and . _ : - are")
        if len(str(self)) > MAX_CHARS:
            raise ValueError(f"numerics of {len(str(self))} characters; at most {MAX_CHARS}")

    def __str__(self) -> str:
        parts = [SHORT_DTYPES.get(self.compute, self.compute)]
        parts += [] if self.weights == WHOLE else [self.weights]
        parts += [f"kv:{self.kv}"] if self.kv else []
        parts += [f"rope:{self.rope}"] if self.rope else []
        parts += [f"tp:{self.tp_degree}"] if self.tp_degree > 1 else []
        parts += [f"pairs:{self.pairs}"] if self.pairs else []
        return "+".join(parts)


def spoken(numerics: str) -> str:
    """Return an engine's numerics for a message to people."""
    return numerics or "unknown (an earlier version)"
