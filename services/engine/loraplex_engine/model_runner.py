"""What computes: a compute backend, and what it returns while a step or an adapter is on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray

    from loraplex_engine.step import StepPlan, StepResult


class StepHandle(Protocol):
    """A step on its way through the device."""

    @property
    def masks(self) -> NDArray[np.int32]:
        """Memory for the masks of the plan's M masked rows, int32 ``[M, words]``; to be filled before `draw`.

        Bit ``t % 32`` of word ``t // 32`` says whether the row may draw token t: of the vocabulary and, beside an adapter that adds
        tokens, of those. Only for a plan with masked rows, once the results of all earlier steps have been read.
        """
        ...

    def draw(self) -> None:
        """Draw the tokens of a plan with masked rows, under `masks`; before the next launch."""
        ...

    def is_done(self) -> bool:
        """Tell without blocking whether the device has finished the step, reads of its pages included."""
        ...

    def wait(self) -> StepResult:
        """Block until the step's tokens are on the host."""
        ...


class LoadHandle(Protocol):
    """An adapter's pages on their way from the host arena to the pool."""

    def is_done(self) -> bool:
        """Tell without blocking whether a step launched now may read the pages.

        Raises:
            LoraplexError: If this adapter could not be made ready; nothing reads or writes its pages any more.
            RuntimeError: If the copy failed; the device cannot be trusted any more, and the loop ends.
        """
        ...

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once, from any thread, when `is_done` turned true or would raise; at once if it has.

        The callback wakes a step loop that has nothing else to do; it must be cheap and must not raise.
        """
        ...


class ModelRunner(Protocol):
    """A compute backend. Not thread-safe: the step loop is its only caller.

    The pool's memory belongs to the runner; the `PagePool` only accounts for it.

    Attributes:
        backend: Name of the backend: ``torch`` or ``cuda``.
    """

    backend: ClassVar[str]

    @property
    def geometry(self) -> Geometry:
        """What adapter images must be laid out for, as announced to the store."""
        ...

    @property
    def weight_norms(self) -> tuple[float, ...]:
        """Frobenius norms of the base's weights, for each layer and projection in the geometry's order; may be empty."""
        ...

    @property
    def pipeline_depth(self) -> int:
        """Most plans worth having in flight: 1 if `launch` computes before it returns, else 2."""
        ...

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step. Plans execute in the order of launches; of a plan with masked rows, only the forward pass starts.

        A row's exception is among the result's ``failed_slots``; an exception raised here ends the step loop.
        """
        ...

    def check_adapter(self, spec: AdapterSpec) -> None:
        """Return if the runner can compute an adapter; from any thread.

        Raises:
            AdapterIncompatibleError: If it cannot; the message names module, rank and remedy.
        """
        ...

    def pin_host_memory(self, arena: NDArray[np.uint8]) -> object:
        """Start to pin the memory that images will come from, ``[num_slots, page_bytes]``, if it makes copies faster.

        The memory stays mapped until `close`.
        """
        ...

    def load_adapter(
        self,
        index: int,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        source: NDArray[np.uint8],
        slots: tuple[int, ...] = (),
    ) -> LoadHandle:
        """Start to copy an image into pages of the pool and bind it to an index of the adapter table.

        The copy is ordered after every step launched so far, as these may still read what the pages held before.

        Args:
            index: Free index of the adapter table; plans may name it once the handle is done.
            spec: Modules, ranks and scalings.
            pages: int32 ``[num_pages]``; page ids in image order.
            source: Host memory ``[num_pages, page_bytes]``, not always contiguous in dim 0; unchanged until done.
            slots: Where ``source`` lies in the arena; the other ranks of a group read their images from the same slots of their
                parts. A runner of one device does not need them.

        Raises:
            LoraplexError: If this one adapter cannot be bound. Nothing is bound or copied then, and the runner goes on;
                any other exception means that the device cannot be trusted any more.
        """
        ...

    def unload_adapter(self, index: int) -> None:
        """Unbind an index; no later plan names it until it is loaded again."""
        ...

    def close(self) -> None:
        """Free the device's memory."""
        ...
