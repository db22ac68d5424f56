"""Images on their way from the arena to the device; runs on the step loop's thread.

An adapter that the runner cannot take ends the requests that wait for it, with the reason, and no others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.errors import LoraplexError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.loop.engine_state import EngineState
    from loraplex_engine.messages import ImageArrived
    from loraplex_engine.model_runner import LoadHandle, ModelRunner


class AdapterLoading:
    """Hands images to the runner and notes which loads are done.

    Args:
        wake: Called from any thread when a load has ended.
    """

    def __init__(self, state: EngineState, runner: ModelRunner, *, wake: Callable[[], None]) -> None:
        self._cache, self._scheduler, self._arena = state.cache, state.scheduler, state.arena
        self._runner = runner
        self._wake = wake
        self._handles: dict[str, tuple[int, LoadHandle]] = {}  # with the adapter's index

    def image_arrived(self, image: ImageArrived) -> None:
        """Take over an image in the arena, unless the runner cannot compute its adapter."""
        try:
            self._runner.check_adapter(image.spec)
        except LoraplexError as error:
            self._arena.free(image.arena_slots)
            self._scheduler.image_refused(image.spec.digest, error)
        else:
            self._scheduler.image_arrived(image.spec, image.arena_slots)

    def start(self) -> None:
        """Have the runner unbind the adapters that left, and start the loads that were decided on."""
        for index in self._cache.loads.take_unloads():
            self._runner.unload_adapter(index)
        for load in self._cache.loads.take_loads():
            source = self._arena.pages(load.arena_slots)
            try:
                handle = self._runner.load_adapter(load.index, load.spec, load.pages, source, load.arena_slots)
            except LoraplexError as error:
                self._scheduler.load_refused(load.digest, error)
                continue
            self._handles[load.digest] = load.index, handle
            handle.add_done_callback(self._wake)

    def take_finished(self) -> None:
        """Take over the loads that are done, and end the requests that wait for one that failed."""
        for digest, (index, handle) in list(self._handles.items()):
            try:
                if not handle.is_done():
                    continue
            except LoraplexError as error:
                del self._handles[digest]
                self._runner.unload_adapter(index)
                self._scheduler.load_refused(digest, error)
                continue
            del self._handles[digest]
            self._cache.load_finished(digest)
