"""One attached engine: answers its wants, passes hints on, and knows what it holds."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import AdapterCorruptError, InvalidParameterError, LoraplexError, SaturatedError
from loraplex_common.log import get_logger
from loraplex_common.tasks import cancel_and_wait

from loraplex_adapter_store.attach.filler import Filler
from loraplex_adapter_store.attach.messages import (
    Ack,
    Decline,
    Drop,
    Filled,
    FromEngine,
    Grant,
    HeldImage,
    Hello,
    Place,
    Refuse,
    Residency,
    ToEngine,
    Want,
)
from loraplex_adapter_store.attach.outbox import Outbox
from loraplex_adapter_store.attach.transfer import Transfer, TransferState
from loraplex_adapter_store.attach.transfer_span import begin_span, ending_span

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from concurrent.futures import Executor

    from loraplex_adapter_store.images import ImageCache
    from loraplex_adapter_store.metrics import StoreMetrics

_log = get_logger()
MAX_TRANSFERS: Final = 4096
MAX_ATTEMPTS: Final = 2
WRITTEN_BYTES: Final = 8 * 1024 * 1024
"""Pages of that many bytes are named at once: a message takes as long as to hash some hundred KiB."""
_WORKING: Final = frozenset({TransferState.PREPARING, TransferState.FILLING})


class EngineSession:
    """The store's side of one AttachEngine stream.

    Args:
        executor: Runs the copies into shared memory.
        on_residency: Called after each change of what the engine holds.
    """

    def __init__(
        self,
        hello: Hello,
        images: ImageCache,
        metrics: StoreMetrics,
        executor: Executor,
        on_residency: Callable[[], None],
    ) -> None:
        self.hello = hello
        self._on_residency = on_residency
        self._images = images
        self._metrics = metrics
        self._held = {held.digest: held for held in hello.held}
        self._sequence = hello.sequence
        self._outbox = Outbox(max(1, WRITTEN_BYTES // hello.geometry.page_bytes))
        self._filler = Filler(hello, images, self._outbox, executor, metrics)
        self._transfers: dict[str, Transfer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wants_changed = asyncio.Condition()
        self.changed = asyncio.Event()

    @property
    def shared_memory(self) -> list[bool]:
        """Per rank, whether pages are written straight into the arena."""
        return self._filler.shared_memory

    @property
    def held(self) -> dict[str, HeldImage]:
        """What the engine holds: digest -> image."""
        return self._held

    @property
    def num_transfers(self) -> int:
        """Transfers under way."""
        return len(self._transfers)

    async def outgoing(self) -> AsyncIterator[ToEngine]:
        """Yield the messages to send, until `end`."""
        while (message := await self._outbox.get()) is not None:
            yield message

    def end(self) -> None:
        """Let `outgoing` end: the engine sends no more, or another stream of the same engine has taken over."""
        self._outbox.close()

    def handle(self, message: FromEngine) -> None:
        """Act on a message of the engine; never waits.

        Raises:
            InvalidParameterError: If the engine breaks the protocol.
        """
        match message:
            case Want():
                self.want(message.digest, message.time_left_s, message.traceparent)
            case Grant():
                self._grant(message)
            case Decline():
                self._decline(message)
            case Residency():
                self._residency(message)

    def want(self, digest: str, time_left_s: float | None = None, traceparent: str = "") -> None:
        """Bring an image to the engine for a waiting request; ``time_left_s`` is how long the request can wait."""
        transfer = self._transfers.get(digest)
        if transfer is None:
            transfer = self._start(digest, is_wanted=True)
            if transfer is not None:
                transfer.needed_within(time_left_s)
                begin_span(transfer, traceparent)
            return
        begin_span(transfer, traceparent)
        transfer.want()
        transfer.needed_within(time_left_s)
        if transfer.state is TransferState.OFFERED:
            self._spawn(self._offer(transfer), f"offer {digest[:12]}")  # the engine may have declined the first offer
        self._spawn(self._tell_waiting(), f"promote {digest[:12]}")

    def prefetch(self, digest: str, wanted_in_s: float | None = None) -> None:
        """Offer an image although no request waits for it.

        Args:
            digest: Digest of the image.
            wanted_in_s: Seconds until a hint says it will be wanted; soonest first, images without a hint last.
        """
        if digest in self._held:
            return
        transfer = self._transfers.get(digest) or self._start(digest, is_wanted=False)
        if transfer is not None and wanted_in_s is not None:
            transfer.foreseen_within(wanted_in_s)

    def expect(self, digest: str) -> None:
        """Offer an image that a label is about to move to; the engine makes room for it."""
        self.prefetch(digest, 0.0)
        if (transfer := self._transfers.get(digest)) is not None:
            transfer.is_expected = True

    def fill_idle_room(self) -> None:
        """Offer recently used images of this geometry that the engine lacks, up to the number of its free slots."""
        free = min((arena.num_free for arena in self.hello.arenas), default=0)
        for digest, num_pages in self._images.recent(self.hello.geometry).items():
            if digest in self._held:
                continue
            free -= num_pages
            if free < 0:
                return
            self.prefetch(digest)

    async def drop(self, digest: str) -> None:
        """Tell the engine that an image will not be wanted."""
        self._metrics.churn.labels("drop").inc()
        await self._outbox.put(Drop(digest))

    async def close(self) -> None:
        """End all transfers and release the arenas."""
        await cancel_and_wait(*self._tasks)
        self._filler.close()

    def _grant(self, grant: Grant) -> None:
        transfer = self._transfers.get(grant.digest)
        if transfer is None:
            raise InvalidParameterError(f"grant for {grant.digest}: nothing is offered", field="grant")
        if transfer.state is TransferState.OFFERED:
            transfer.grant(grant, self.hello.arenas[grant.rank].num_slots if grant.rank < len(self.hello.arenas) else 0)
        # else: the second grant after a repeated offer; the slots of the first are being filled

    def _decline(self, message: Decline) -> None:
        transfer = self._transfers.get(message.digest)
        if transfer is not None and transfer.state is TransferState.OFFERED and transfer.decline():
            del self._transfers[message.digest]  # at once, so that a want that follows starts anew

    def _residency(self, event: Residency) -> None:
        self._sequence = max(self._sequence, event.sequence)
        if event.held.place is Place.GONE:
            self._held.pop(event.held.digest, None)
        else:
            self._held[event.held.digest] = event.held
        if (transfer := self._transfers.get(event.held.digest)) is not None:
            transfer.report(event.held.place, event.failure)
        self._outbox.acknowledge(Ack(self._sequence, len(self._held)))
        self.changed.set()
        self._on_residency()

    def _start(self, digest: str, *, is_wanted: bool) -> Transfer | None:
        if len(self._transfers) >= MAX_TRANSFERS:
            error = SaturatedError(f"{MAX_TRANSFERS} images are on their way to this engine", retry_after_s=1.0)
            self._spawn(self._outbox.put(Refuse(digest, error)), f"refuse {digest[:12]}")
            return None
        transfer = Transfer(digest, is_wanted=is_wanted, num_ranks=len(self.hello.arenas))
        self._transfers[digest] = transfer
        self._spawn(self._transfer(transfer), f"transfer {digest[:12]}")
        return transfer

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("transfer failed", engine=self.hello.engine_id, task=task.get_name(), exc_info=task.exception())

    async def _transfer(self, transfer: Transfer) -> None:
        """Bring one image into the engine; if a want cannot be met, exactly one refusal is sent."""
        try:
            with ending_span(transfer, self.hello.engine_id):
                await self._carry_out(transfer)
        except LoraplexError as error:
            await self._refuse(transfer, error)
        except Exception:
            await self._refuse(transfer, LoraplexError(f"revision {transfer.digest}: the transfer failed"))
            raise
        finally:
            transfer.advance(TransferState.ENDED)
            if self._transfers.get(transfer.digest) is transfer:
                del self._transfers[transfer.digest]
                if transfer.is_wanted_again and transfer.digest not in self._held:
                    self.want(transfer.digest)  # the engine dropped the image, and needs it after all
            await self._tell_waiting()

    async def _refuse(self, transfer: Transfer, error: LoraplexError) -> None:
        self._metrics.churn.labels("refuse").inc()
        _log.info("image refused", engine=self.hello.engine_id, revision=transfer.digest, error=error.message)
        if transfer.is_wanted:
            await self._outbox.put(Refuse(transfer.digest, error))

    async def _carry_out(self, transfer: Transfer) -> None:
        for _ in range(MAX_ATTEMPTS):
            await self._attempt(transfer)
            if transfer.failure is None:
                return
            self._metrics.verify_failures.inc()
            _log.warning(
                "engine found an image corrupt",
                engine=self.hello.engine_id,
                revision=transfer.digest,
                error=transfer.failure,
            )
            failure = transfer.failure
            self._images.drop(transfer.digest, is_damaged=True)
            transfer.advance(TransferState.PREPARING)
        raise AdapterCorruptError(f"revision {transfer.digest}: its image arrived corrupt twice: {failure}")

    async def _attempt(self, transfer: Transfer) -> None:
        await self._let_wants_pass(transfer)
        transfer.offers = await self._filler.offers(transfer)
        transfer.advance(TransferState.OFFERED)
        await self._tell_waiting()
        await self._offer(transfer)
        slots = await transfer.wait_for_slots()
        if slots is None:
            self._metrics.churn.labels("decline").inc()
            return
        transfer.advance(TransferState.FILLING)
        let_pass = partial(self._let_wants_pass, transfer)
        await let_pass()
        digests = [await self._filler.fill(transfer, rank, slots[rank], let_pass) for rank in range(len(slots))]
        transfer.advance(TransferState.SENT)
        await self._tell_waiting()
        for rank, digest in enumerate(digests):
            await self._outbox.put(Filled(transfer.digest, rank, digest))
        if await transfer.wait_for_arrival() and transfer.failure is None:
            self._metrics.churn.labels("push").inc()

    async def _offer(self, transfer: Transfer) -> None:
        """Send the offers of all ranks, next to each other: an engine takes another one of a rank for the first of new ones."""
        async with transfer.offering:
            for offer in transfer.current_offers():
                if transfer.state is TransferState.OFFERED:
                    await self._outbox.put(offer)

    async def _let_wants_pass(self, transfer: Transfer) -> None:
        """Hold an unsolicited transfer back while wanted transfers have work to do."""
        if transfer.is_wanted:
            return
        async with self._wants_changed:
            await self._wants_changed.wait_for(lambda: transfer.is_wanted or not self._has_working_wants())

    def _has_working_wants(self) -> bool:
        return any(other.is_wanted and other.state in _WORKING for other in self._transfers.values())

    async def _tell_waiting(self) -> None:
        async with self._wants_changed:
            self._wants_changed.notify_all()
