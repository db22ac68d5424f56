"""Changes to the kernels of an FP8 decode step, each alone: a kernel left out, or cut another way.

A step without a kernel computes nothing of use, and the kernels behind it read whatever lies there; what its time is short of the
whole step's is what the kernel adds to the step, launch and waiting included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Final

from loraplex_engine.runners.cuda.decoder import CudaDecoder
from loraplex_engine.runners.cuda.gate_products import GateProducts
from loraplex_kernels.attention.rope_kv import RopeKv
from loraplex_kernels.pointwise import fp8
from loraplex_kernels.products import fp8_cut
from loraplex_kernels.products.fp8_cut import WIDE_MAX_ROWS, Cut, choose_cuts
from loraplex_kernels.sampling.greedy import Greedy

Change = Callable[[], AbstractContextManager[None]]
"""Begins a change; engines that are made before it ends have it."""


@contextmanager
def changed(owner: Any, **values: object) -> Iterator[None]:
    """Give attributes of a class or module other values.

    Raises:
        AttributeError: If an attribute is not there.
    """
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _nothing(*_: object, **__: object) -> None:
    """Launch no kernel."""


def _not_there(*_: object) -> bool:
    """Compute no gate within a product; in the place of `GateProducts.launch`."""
    return False


def _buffer(_: object, __: object, ___: object, buffer: Any) -> Any:
    """Return where an input is written in bf16, whatever reads it; in the place of `CudaDecoder._input`."""
    return buffer


def _cuts_of_four(outputs: int, num_sms: int) -> tuple[Cut, ...]:
    """Return the cuts of `choose_cuts`, but for wide products four warpgroups in one CTA."""
    cuts = choose_cuts(outputs, num_sms)
    if cuts[-1].rows > WIDE_MAX_ROWS:
        return cuts
    return tuple(Cut.filling(rows=each.rows, warpgroups=4, parts=1, cluster=1, ctas=1) for each in cuts)


LEFT_OUT: Final[Mapping[str, Change]] = {
    "norms": partial(changed, fp8.RmsNormFp8, launch=_nothing),
    "RoPE and KV": partial(changed, RopeKv, launch=_nothing),
    "quantising inputs of o and down": partial(changed, fp8.QuantiseFp8, launch=_nothing),
    "greedy rows": partial(changed, Greedy, launch=_nothing),
}
"""By what is left out."""
QUANTISE_VECTORS: Final = (224, 896)
"""Vectors of a CTA that quantises down's input; the engine's are `fp8.QUANTISE_VECTORS`."""
OTHERWISE: Final[Mapping[str, Change]] = {
    "bf16 of norm and gate, too": partial(changed, CudaDecoder, _input=_buffer),
    "gate behind gate_up's product": partial(changed, GateProducts, launch=_not_there),
    "gate_up of four warpgroups a CTA": partial(changed, fp8_cut, choose_cuts=_cuts_of_four),
} | {
    f"down's input quantised by CTAs of {vectors} vectors": partial(changed, fp8, QUANTISE_VECTORS=vectors)
    for vectors in QUANTISE_VECTORS
}
"""By what is otherwise."""
