"""Copies adapter images from the arena to the pool, page by page, on a stream of their own.

Order: the copy stream waits for an event behind the last launched step, which may still read the old content of the
pages, or of the index's rows of the tables. Steps launched later read the pages only once the load's own event was
seen.
"""

from __future__ import annotations

import itertools
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from cuda.bindings import runtime
from loraplex_common.errors import AdapterIncompatibleError, SaturatedError
from loraplex_kernels.lora.ranges import TableFullError

from loraplex_engine.runners.cuda.host_memory import PinnedArena, check
from loraplex_engine.runners.cuda.magnitude_loads import MagnitudeLoad
from loraplex_engine.runners.cuda.magnitudes import has_magnitudes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_kernels.lora.tables import AdapterTables
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.runners.cuda.magnitude_loads import MagnitudeLoads

TABLE_RETRY_S: Final = 1.0  # evictions of other adapters free tiles
MAX_COPY_BYTES: Final = 4 << 20
"""The longest copy of pages that lie behind each other: few calls, and a step's own inputs wait for none longer than 0.1 ms."""
HOST_TO_DEVICE = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice


class CudaLoadHandle:
    """An adapter being copied; see `LoadHandle`."""

    def __init__(self, event: torch.cuda.Event, staging: Tensor | None, watcher: LoadWatcher) -> None:
        self._event = event
        self._staging = staging  # kept alive until the copy has read it
        self._watcher = watcher

    def is_done(self) -> bool:
        """Tell whether a step launched now may read the pages."""
        if not self._event.query():  # type: ignore[no-untyped-call]
            return False
        self._staging = None
        return True

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Have a function called once the pages may be read, or the device failed, on the watcher's thread."""
        self._watcher.watch(self._event, callback)


class LoadWatcher:
    """A thread that waits for loads, so that a step loop with nothing to compute can sleep."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._watched: SimpleQueue[tuple[torch.cuda.Event, Callable[[], None]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapter-loads", daemon=True)
        self._thread.start()

    def watch(self, event: torch.cuda.Event, callback: Callable[[], None]) -> None:
        """Call a function once an event is reached; loads end in the order in which they began."""
        self._watched.put((event, callback))

    def close(self) -> None:
        """Stop after the event that is being watched."""
        self._watched.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while (watched := self._watched.get()) is not None:
            event, callback = watched
            try:
                event.synchronize()
            finally:
                callback()  # a failed device shows in `CudaLoadHandle.is_done`, which raises


class AdapterLoads:
    """Copies images into the pool and binds them in the device tables.

    Args:
        pool: uint8 ``[pages, page_bytes]``.
        tables: Device tables.
        magnitudes: Computes c of DoRA adapters behind the copy.
    """

    def __init__(self, pool: Tensor, tables: AdapterTables, magnitudes: MagnitudeLoads) -> None:
        self._pool, self._tables, self._magnitudes = pool, tables, magnitudes
        self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._watcher = LoadWatcher(pool.device)
        self._arena: PinnedArena | None = None

    def pin(self, arena: NDArray[np.uint8]) -> PinnedArena:
        """Start to pin the memory that images will come from."""
        if self._arena is not None:
            raise RuntimeError("an arena is pinned already")
        self._arena = PinnedArena(arena, self._pool.device)
        return self._arena

    def load(
        self,
        index: int,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        source: NDArray[np.uint8],
        compute: torch.cuda.Stream,
    ) -> CudaLoadHandle | MagnitudeLoad:
        """Start a load behind everything launched on the compute stream; see `ModelRunner.load_adapter`.

        Raises:
            AdapterIncompatibleError: If the kernels cannot take the adapter; nothing was done.
            SaturatedError: If the device tables have no room for it; nothing was done.
        """
        staging = None
        if self._arena is None or not self._is_pinned(source):
            staging = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
            np.copyto(staging.numpy(), source)
            source = staging.numpy()
        self._stream.wait_stream(compute)
        # The thread of magnitudes waits meanwhile: each call below gives up the interpreter, and would wait to get it back.
        with self._magnitudes.turn, torch.cuda.stream(self._stream):
            self._bind(index, spec, pages)  # first: an adapter that cannot be bound must start no copy
            self._copy(pages, source)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
        if has_magnitudes(spec):
            load = MagnitudeLoad(spec, pages, event, compute, staging)
            self._magnitudes.start(load)
            return load
        return CudaLoadHandle(event, staging, self._watcher)

    def _bind(self, index: int, spec: AdapterSpec, pages: NDArray[np.int32]) -> None:
        try:
            self._tables.bind(index, spec, pages)
        except TableFullError as error:
            raise SaturatedError(f"adapter {spec.digest}: {error}", retry_after_s=TABLE_RETRY_S) from error
        except ValueError as error:
            raise AdapterIncompatibleError(f"adapter {spec.digest}: {error}") from error

    def unload(self, index: int) -> None:
        """Unbind an index; launched steps keep the adapter that they read."""
        self._tables.unbind(index)

    def close(self) -> None:
        """Wait for the copies and release the arena."""
        self._magnitudes.close()
        self._stream.synchronize()
        self._watcher.close()
        if self._arena is not None:
            self._arena.close()

    def _is_pinned(self, source: NDArray[np.uint8]) -> bool:
        assert self._arena is not None
        begin, extent = source.__array_interface__["data"][0], (len(source) - 1) * source.strides[0] + source.shape[1]
        return source.strides[1] == 1 and self._arena.holds(begin, extent)

    def _rows_to_borders(self, begin: int, page_bytes: int) -> tuple[int, int] | None:
        first = None if self._arena is None else self._arena.bytes_to_border(begin)
        if self._arena is None or first is None:
            return None
        return first // page_bytes, self._arena.chunk_bytes // page_bytes

    def _copy(self, pages: NDArray[np.int32], source: NDArray[np.uint8]) -> None:
        """Copy pages, those that lie behind each other at once, but for the border of two registrations of the arena."""
        page_bytes = self._pool.shape[1]
        target, stream = self._pool.data_ptr(), self._stream.cuda_stream
        begin, stride = source.__array_interface__["data"][0], source.strides[0]
        borders = self._rows_to_borders(begin, page_bytes)
        for row, page, count in page_runs(pages, MAX_COPY_BYTES // page_bytes if stride == page_bytes else 1, borders):
            result = runtime.cudaMemcpyAsync(
                target + page * page_bytes, begin + row * stride, count * page_bytes, HOST_TO_DEVICE, stream
            )
            check(result, f"copy of {count} adapter pages from {page} on")


def page_runs(
    pages: NDArray[np.int32], longest: int, borders: tuple[int, int] | None = None
) -> Iterator[tuple[int, int, int]]:
    """Yield (row, page, count) of runs of consecutive pages, each at most ``longest`` of them, at least one.

    Args:
        pages: int32 ``[rows]``.
        longest: Most pages of a run.
        borders: The first row that no run may reach over, and the rows from it to each next one; None for none.
    """
    cuts = np.append(np.flatnonzero(np.diff(pages, prepend=-2) != 1), len(pages))
    if borders is not None:
        cuts = np.union1d(cuts, np.arange(borders[0], len(pages), borders[1]))
    for begin, end in itertools.pairwise(cuts.tolist()):
        for row in range(begin, end, max(longest, 1)):
            yield row, int(pages[row]), min(max(longest, 1), end - row)
