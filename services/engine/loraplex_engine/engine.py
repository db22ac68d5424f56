"""The engine as one object: pool, arena, scheduler and step loop, built from parameters and a runner.

Services, benchmarks and tests drive the same object; nothing here knows of gRPC.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from loraplex_common.adapter_image import Geometry
from loraplex_common.errors import LoraplexError
from loraplex_engine.adapter_cache import AdapterStatus
from loraplex_engine.arena import HostArena
from loraplex_engine.messages import Command, LoadSnapshot, StoreEvent
from loraplex_engine.outbox import MAX_BACKLOG_BYTES, MAX_BACKLOG_S, SessionOutbox
from loraplex_engine.step import ModelRunner


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineParams:
    """What an engine is built from, besides its runner.

    Attributes:
        geometry: Of the base model on this device; what adapter images depend on.
        block_tokens: Tokens of one sequence in one KV page.
        pool_bytes: Device memory of the page pool; rounded down to whole pages.
        arena_bytes: Host memory of the arena; rounded down to whole pages.
        eos_token_ids: The model's end-of-text ids.
        max_model_len: Longest sequence, prompt and output together, in tokens.
        max_num_seqs: Most sequences of one step.
        max_num_batched_tokens: Most tokens of one step.
        max_pass_over_s: How long others may go first while a request waits for pages.
        max_resident_adapters: Size of the runner's adapter table.
        max_backlog_bytes: Unread output at which a session is given up.
        max_backlog_s: Age of unread output at which a session is given up.
    """

    geometry: Geometry
    block_tokens: int
    pool_bytes: int
    arena_bytes: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_pass_over_s: float = 2.0
    max_resident_adapters: int = 4096
    max_backlog_bytes: int = MAX_BACKLOG_BYTES
    max_backlog_s: float = MAX_BACKLOG_S

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.pool_bytes // self.geometry.page_bytes

    @property
    def num_arena_slots(self) -> int:
        """Slots of the arena."""
        return self.arena_bytes // self.geometry.page_bytes


RunnerFactory = Callable[[EngineParams], ModelRunner]


class Engine:
    """A running engine. All methods may be called from any thread unless they say otherwise.

    Args:
        params: Sizes and limits.
        runner_factory: Makes the compute backend; called once, in the constructor.
        on_store_event: Gets `WantImage` and `ResidencyChanged`, on the loop's thread, in order; must be quick
            (``asyncio_loop.call_soon_threadsafe(queue.put_nowait, event)``).
        on_crash: Called once, on the loop's thread, if the step loop dies; the engine then refuses everything.
    """

    params: EngineParams
    arena: HostArena

    def __init__(
        self,
        params: EngineParams,
        runner_factory: RunnerFactory,
        *,
        on_store_event: Callable[[StoreEvent], None],
        on_crash: Callable[[BaseException], None],
    ) -> None: ...

    def post(self, command: Command) -> None:
        """Hand a command to the step loop; never blocks."""

    def open_session(self) -> SessionOutbox:
        """Open a session; its ``session_id`` goes into every `Submission` of it. Close: post `CloseSession`."""

    def snapshot(self) -> LoadSnapshot:
        """Return the load after the latest step; never blocks."""

    def list_adapters(self) -> Future[list[AdapterStatus]]:
        """Ask for all adapters the engine knows, by digest; WANTED ones included.

        From asyncio: ``await asyncio.wrap_future(engine.list_adapters())``. All futures of this class are alike.
        """

    def pin(self, digest: str) -> Future[AdapterStatus]:
        """Keep an adapter in the pool whatever the pressure; it is loaded if it is only in the arena.

        The future raises AdapterNotFoundError if the engine doesn't hold it, SaturatedError if pins take too much.
        """

    def unpin(self, digest: str) -> Future[AdapterStatus]:
        """Make an adapter evictable again; AdapterNotFoundError if the engine doesn't hold it."""

    def evict(self, digest: str, require_generation: int | None = None) -> Future[AdapterStatus]:
        """Free an adapter's pages once its last lease is returned; its image stays in the arena.

        The future raises AdapterNotFoundError, or ConflictError if the generation is another.
        """

    def grant_slots(self, digest: str, num_pages: int, *, is_wanted: bool) -> Future[tuple[int, ...] | None]:
        """Ask for arena slots for an image on offer.

        A wanted image waits for room (cancel the future if the store goes away); an unwanted one resolves to None at
        once if there is no idle room, or if the engine has the image. None for a wanted one: nobody wants it any more
        or it can never fit. Slots granted are given back by `return_slots`, or handed over by posting `ImageArrived`.
        """

    def return_slots(self, slots: tuple[int, ...]) -> None:
        """Give granted slots back unused: the transfer failed."""

    def drain(self, timeout_s: float) -> Future[int]:
        """Refuse new requests (DrainingError), let the others finish for that long, then end them.

        The future resolves to the number of requests ended before their time, once none is left.
        """

    @property
    def is_healthy(self) -> bool:
        """False once the step loop has died."""

    def close(self) -> None:
        """End all requests with DrainingError, stop the loop, free device and arena. Not from the loop's thread."""
