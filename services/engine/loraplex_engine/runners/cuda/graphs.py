"""Decode steps as CUDA graphs: one per bucket of rows and variant.

Variants differ in the ops that have LoRA at all. A fused expand visits every row of an op, adapted or not, so a batch
whose adapters leave the MLP alone, or that has none, is faster without it: 2.1 ms of a 28.6 ms step of 256 rows.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from loraplex_common.adapter_image import Geometry
    from numpy.typing import NDArray

ATTENTION: Final = "self_attn."  # what the paths of attention's projections begin with
SMALL_BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32)
STEPS: Final = ((256, 16), (1024, 64), (1 << 30, 256))
"""(upper bound, distance): buckets of more than 32 rows, up to the bound, are this far apart."""


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Return bucket sizes in rising order; the last is the first that holds ``max_rows``."""
    sizes = [size for size in SMALL_BUCKETS if size < max_rows]
    if len(sizes) < len(SMALL_BUCKETS):
        return (*sizes, SMALL_BUCKETS[len(sizes)])
    while sizes[-1] < max_rows:
        distance = next(distance for upper, distance in STEPS if sizes[-1] < upper)
        sizes.append((sizes[-1] // distance + 1) * distance)
    return tuple(sizes)


def lora_variants(geometry: Geometry) -> tuple[frozenset[str], ...]:
    """Return the names of the ops with LoRA of each variant, smallest first: none, attention's, all.

    The last serves any mix.
    """
    attention = {
        op.name for op in geometry.decoder_ops if all(each.path.startswith(ATTENTION) for each in op.projections)
    }
    every = {op.name for op in geometry.decoder_ops}
    return tuple(dict.fromkeys((frozenset[str](), frozenset(attention), frozenset(every))))


def variant_of(variants: tuple[frozenset[str], ...], geometry: Geometry, max_stacked: NDArray[np.int32]) -> int:
    """Return the smallest variant that serves a batch.

    Args:
        variants: From `lora_variants`.
        geometry: Geometry of adapter images.
        max_stacked: int32 ``[adapters, ops]``; stacked rank by op of each adapter in the batch.
    """
    used = {op.name for column, op in enumerate(geometry.decoder_ops) if max_stacked[:, column].any()}
    return next(index for index, ops in enumerate(variants) if ops >= used)


class DecodeGraphs:
    """Captured decode steps.

    Args:
        sizes: Buckets in rising order.
        run: Launches one decode step of (bucket, variant) on the current stream; reads and writes fixed buffers.
        stream: Steps run on it.
        num_variants: Of `lora_variants`; one where there is no LoRA.

    Attributes:
        capture_s: Seconds that the capture took.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        run: Callable[[int, int], None],
        stream: torch.cuda.Stream,
        *,
        num_variants: int,
    ) -> None:
        self.sizes = sizes
        self._num_variants = num_variants
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        begin_s = time.perf_counter()
        self._capture(run, stream)
        self.capture_s = time.perf_counter() - begin_s

    def bucket(self, num_rows: int) -> int:
        """Return the smallest bucket that holds a number of rows."""
        return self.sizes[bisect_left(self.sizes, num_rows)]

    def __len__(self) -> int:
        return len(self._graphs)

    def replay(self, bucket: int, variant: int) -> None:
        """Run a captured step on the current stream."""
        self._graphs[bucket, variant].replay()

    def _capture(self, run: Callable[[int, int], None], stream: torch.cuda.Stream) -> None:
        """Capture, largest bucket first, so that smaller ones find its memory in the shared pool."""
        memory = torch.cuda.graph_pool_handle()
        for size in reversed(self.sizes):
            for variant in reversed(range(self._num_variants)):
                if size in (self.sizes[0], self.sizes[-1]):  # load kernels and let cuBLAS make its workspaces
                    with torch.cuda.stream(stream):
                        run(size, variant)
                    stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                # Other threads go on meanwhile: they pin memory and wait for events, which a global capture would
                # forbid.
                with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                    run(size, variant)
                self._graphs[size, variant] = graph
