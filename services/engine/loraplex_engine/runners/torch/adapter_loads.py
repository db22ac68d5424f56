"""Copies adapter images into the pool on threads of their own, and makes them ready to be read.

Order: a load waits until the steps launched before it have been computed, as these may still read what the pages held. On a
GPU it waits on the device, on a stream for copies.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_common.errors import SaturatedError

from loraplex_engine.runners.torch.adapter_table import AdapterTable
from loraplex_engine.runners.torch.factors import FactorWriter
from loraplex_engine.runners.torch.handles import TorchLoadHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.rank_group import RankGroup
    from loraplex_engine.runners.token_rows import TokenRows
    from loraplex_engine.runners.torch.attention import PagedPool
    from loraplex_engine.runners.torch.handles import TorchStepHandle

FACTOR_NICENESS: Final = 10
"""Added to the niceness of the thread that computes factors, which Linux keeps by thread: steps on the same cores go first."""
FACTORS_RETRY_S: Final = 1.0


class AdapterLoads:
    """Adapters in the pool and on their way to it.

    Args:
        geometry: Geometry of images.
        pool: The pool.
        linears: The model's fused products, by layer and op.
        rows: Is told of adapters with rows of tokens.
        group: The tensor-parallel ranks, which all load the same adapters in one order; None if there is one rank.

    Attributes:
        tables: Index of the adapter table -> adapter.
        outside: Indices of adapters that do something outside of the decoder layers, those on their way among them.
        factors: Computes what DoRA needs.
    """

    def __init__(
        self,
        geometry: Geometry,
        pool: PagedPool,
        linears: Sequence[Mapping[str, Linear]],
        rows: TokenRows,
        group: RankGroup | None = None,
    ) -> None:
        self._geometry, self._pool, self._rows, self._group = geometry, pool, rows, group
        self.outside: set[int] = set()
        self.factors = FactorWriter(linears, group=group)
        self.tables: dict[int, AdapterTable] = {}
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="adapter-copy")
        self._computer = ThreadPoolExecutor(
            1, thread_name_prefix="adapter-factors", initializer=os.nice, initargs=(FACTOR_NICENESS,)
        )
        is_cuda = pool.pages.device.type == "cuda"
        self._stream = torch.cuda.Stream() if is_cuda else None  # type: ignore[no-untyped-call]

    def load(
        self,
        index: int,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        source: NDArray[np.uint8],
        readers: list[TorchStepHandle],
    ) -> TorchLoadHandle:
        """Start a load; see `ModelRunner.load_adapter`.

        Adapters whose factors have to be computed have a thread of their own, so that plain copies do not wait for them.

        Args:
            index: Index of the adapter table.
            spec: The adapter.
            pages: Page ids in image order.
            source: The image.
            readers: Launched steps, which may read the pages.

        Raises:
            AdapterIncompatibleError: If it cannot be computed with its rows of tokens.
        """
        if index in self.tables:
            raise RuntimeError(f"index {index} of the adapter table is in use")
        row_ids = self._rows.bind(index, spec, source)
        if any(module.layer == self._geometry.outside for module in spec.modules):
            self.outside.add(index)
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        # In a group one thread keeps the order of the ranks' collectives, whatever is kept where.
        is_kept = self._group is None and spec.digest in self.factors.kept
        must_compute = spec.has_magnitudes and not is_kept
        thread = self._computer if must_compute else self._copier
        make_table = partial(AdapterTable, self._geometry, spec, pages.copy(), self._pool.values, row_ids)
        return TorchLoadHandle(thread.submit(self._load, index, spec, make_table, pages.copy(), source, readers, event))

    def unload(self, index: int) -> None:
        """Unbind an index, also of a load that failed."""
        self.tables.pop(index, None)
        self.outside.discard(index)
        self._rows.unbind(index)

    def _load(
        self,
        index: int,
        spec: AdapterSpec,
        make_table: Callable[[], AdapterTable],
        pages: NDArray[np.int32],
        source: NDArray[np.uint8],
        readers: list[TorchStepHandle],
        event: torch.cuda.Event | None,
    ) -> None:
        for handle in readers:
            handle.computed.wait()
        table = make_table()
        with torch.inference_mode():
            if self._stream is None or event is None:
                memory = self._pool.pages.numpy()
                for row, page in enumerate(pages.tolist()):
                    memory[page] = source[row]
                self._write_factors(spec, table)
            else:
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(event)
                    for row, page in enumerate(pages.tolist()):
                        self._pool.pages[page].copy_(torch.from_numpy(np.array(source[row])))
                    self._write_factors(spec, table)
                self._stream.synchronize()
        self.tables[index] = table

    def _write_factors(self, spec: AdapterSpec, table: AdapterTable) -> None:
        """Compute what DoRA needs.

        Raises:
            SaturatedError: If there is no memory for it; the adapter's requests end, no others.
            RuntimeError: The same of a rank of a group, which is out of step with the other ranks then.
        """
        try:
            self.factors.write(spec.digest, table)
        except (RuntimeError, MemoryError) as error:
            if self._group is not None:
                self._group.abort()
                raise RuntimeError(f"adapter {spec.digest}: its DoRA factors could not be computed: {error}") from error
            raise SaturatedError(
                f"adapter {spec.digest}: its DoRA factors could not be computed: {error}", retry_after_s=FACTORS_RETRY_S
            ) from error

    def close(self) -> None:
        """Stop the threads; loads that have not begun never do."""
        self._copier.shutdown(cancel_futures=True)
        self._computer.shutdown(cancel_futures=True)
        self.tables.clear()
