"""A thread that turns the magnitudes of DoRA adapters into c on the device, projection by projection, beside the steps.

Each piece, at most 8192 outputs of a projection and 16 million numbers of W, is waited for before the next is launched, and
while steps run there is a pause as well: a step is delayed by the few microseconds that reading these weights takes, a few
times. The stream has the lowest priority that there is. One thread takes the adapters in the order of their loads. An adapter
that was computed once is copied from the host the next time. Between pieces the thread waits without the interpreter, and it
launches none while the step loop's thread holds `MagnitudeLoads.turn`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

import torch
from loraplex_common.errors import SaturatedError

from loraplex_engine.runners.cuda.magnitudes import num_magnitudes, ops_with_magnitudes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.rank_group import RankGroup
    from loraplex_engine.runners.cuda.magnitudes import OpMagnitudes, RowScales

MAX_CACHED_BYTES: Final = 512 << 20
"""Host memory for c of adapters that were computed: 5.4 MB each of Llama-2-7B, all seven projections."""
PAUSE_S: Final = 150e-6
"""Between two projections while steps run, so that most of the device is theirs."""


RETRY_S: Final = 1.0


class ScaleCache:
    """The c of adapters by revision on the host, least recently used first, under a bound of bytes."""

    def __init__(self, max_bytes: int = MAX_CACHED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[str, Tensor] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that are held."""
        return self._num_bytes

    def get(self, digest: str) -> Tensor | None:
        """Return an adapter's c, fp32 on the host, if it is held."""
        values = self._values.get(digest)
        if values is not None:
            self._values.move_to_end(digest)
        return values

    def put(self, digest: str, values: Tensor) -> None:
        """Keep an adapter's c; others leave if there is no room."""
        if digest in self._values or values.nbytes > self._max_bytes:
            return
        self._values[digest] = values
        self._num_bytes += values.nbytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._values.popitem(last=False)
            self._num_bytes -= oldest.nbytes


class MagnitudeLoad:
    """An adapter whose c is being computed; see `LoadHandle`.

    Args:
        spec: The adapter.
        pages: Its pages in the pool.
        copied: Behind the copy of its image.
        compute: The stream of the steps.
        staging: Kept alive until the copy has read it.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        copied: torch.cuda.Event | None,
        compute: torch.cuda.Stream | None,
        staging: Tensor | None = None,
    ) -> None:
        self.spec, self.pages, self.copied, self.compute = spec, pages, copied, compute
        self._staging = staging
        self._lock = threading.Lock()
        self._is_over = False
        self._error: BaseException | None = None
        self._ends_engine = False
        self._callbacks: list[Callable[[], None]] = []

    def is_done(self) -> bool:
        """Tell whether a step launched now may read the pages, c included.

        Raises:
            SaturatedError: If c could not be computed, as when there is no memory for it.
            RuntimeError: The same of a rank of a group, which is out of step with the other ranks then.
        """
        if self._error is not None:
            what = f"adapter {self.spec.digest}: its DoRA factors could not be computed: {self._error}"
            if self._ends_engine:
                raise RuntimeError(what) from self._error
            raise SaturatedError(what, retry_after_s=RETRY_S) from self._error
        return self._is_over

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Have a function called once `is_done` is true or raises, on the thread that computes; at once if it is over."""
        with self._lock:
            if not self._is_over:
                self._callbacks.append(callback)
                return
        callback()

    def end(self, error: BaseException | None = None, *, ends_engine: bool = False) -> None:
        """Note that c is written, or why it is not, and whether that is the end of more than the adapter."""
        with self._lock:
            self._error, self._is_over, self._staging = error, True, None
            self._ends_engine = ends_engine
        for callback in self._callbacks:
            callback()


class MagnitudeLoads:
    """Computes c of one adapter after the other.

    Args:
        scales: Computes an op's.
        geometry: Geometry of adapter images.
        device: The device; on a CPU, as tests have it, nothing is waited for.
        group: The tensor-parallel ranks, which all load the same adapters in one order; None if there is one rank.
    """

    def __init__(
        self, scales: RowScales, geometry: Geometry, device: torch.device, group: RankGroup | None = None
    ) -> None:
        self._scales, self._geometry, self._device, self._group = scales, geometry, device, group
        self.cache = ScaleCache()
        self.turn = (
            threading.Lock()
        )  # held by the thread that launches: a piece of this one, or a load of the step loop's
        self._staging = torch.empty(0)  # pinned
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._is_stopping = False
        self._jobs: SimpleQueue[MagnitudeLoad | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapter-magnitudes", daemon=True)
        self._thread.start()

    def start(self, load: MagnitudeLoad) -> None:
        """Take an adapter on; its image may still be under way."""
        self._jobs.put(load)

    def close(self) -> None:
        """Stop after the op that is being computed; adapters that are not done stay so."""
        self._is_stopping = True
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._stream is None:
            with torch.inference_mode():
                self._take_all()
            return
        torch.cuda.set_device(self._device)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._take_all()

    def _take_all(self) -> None:
        while (load := self._jobs.get()) is not None and not self._is_stopping:
            try:
                self._load(load)
            except Exception as error:  # the adapter's requests end with it: `MagnitudeLoad.is_done`
                try:
                    if self._stream is not None:
                        self._stream.synchronize()  # nothing launched may write to pages that are given away
                finally:  # a device that is lost raises here, too, and no request may wait for this load
                    if self._group is not None:
                        self._group.abort()  # the others wait for this rank's part of sums
                    load.end(error, ends_engine=self._group is not None)

    def _load(self, load: MagnitudeLoad) -> None:
        if self._stream is not None and load.copied is not None:
            self._stream.wait_event(load.copied)
        ops = ops_with_magnitudes(self._geometry, load.spec, load.pages)
        known = self.cache.get(load.spec.digest)
        pieces = self._restore(ops, known) if known is not None else self._compute(ops, load.spec)
        while self._launch(pieces):
            self._wait(load.compute)
            if self._is_stopping:
                return
        if known is None:
            count = num_magnitudes(self._geometry, load.spec)
            self.cache.put(load.spec.digest, self._staging[:count].clone())
        load.end()

    def _launch(self, pieces: Iterator[None]) -> bool:
        """Launch the next piece, in turn; tell whether there was one."""
        with self.turn:
            return next(pieces, True) is None

    def _compute(self, ops: Iterator[OpMagnitudes], spec: AdapterSpec) -> Iterator[None]:
        """Compute c into the pool and, for the cache, into the staging buffer; yield after each piece."""
        at, staging = 0, self._staged(num_magnitudes(self._geometry, spec))
        add_ranks = None if self._group is None else self._add_ranks
        for op in ops:
            for values in self._scales.compute(op, add_ranks):
                if values is not None:
                    staging[at : at + len(values)].copy_(values, non_blocking=True)
                    at += len(values)
                yield

    def _add_ranks(self, squares: Tensor) -> None:
        """Sum squares up over the ranks; the thread that launches steps has its turn until all ranks have brought theirs."""
        assert self._group is not None
        self.turn.release()
        try:
            self._group.all_reduce_of_load(squares)
        finally:
            self.turn.acquire()

    def _restore(self, ops: Iterator[OpMagnitudes], known: Tensor) -> Iterator[None]:
        """Copy c into the pool; yield after each op."""
        staging, at = self._staged(len(known)), 0
        staging.copy_(known)
        values = staging.to(self._device, non_blocking=True)
        yield
        for op in ops:
            at += self._scales.restore(op, values[at:])
            yield

    def _staged(self, count: int) -> Tensor:
        """Return the staging buffer, grown to that many numbers; earlier copies out of or into it were waited for."""
        if len(self._staging) < count:
            self._staging = torch.empty(count, pin_memory=self._stream is not None)
        return self._staging[:count]

    def _wait(self, compute: torch.cuda.Stream | None) -> None:
        """Wait for what was launched; while steps run, give them time."""
        if self._stream is None:
            return
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        event.synchronize()
        if compute is not None and not compute.query():
            time.sleep(PAUSE_S)
