"""All engines attached to this replica: the images they hold, and the hints for them."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

from loraplex_common.errors import LoraplexError, RoleForbiddenError
from loraplex_common.ids import is_digest
from loraplex_common.log import get_logger
from loraplex_common.rank_limits import RankLimits
from loraplex_common.registry import hints_key
from loraplex_common.tasks import cancel_and_wait
from loraplex_common.wake_up import WakeUp

from loraplex_adapter_store.attach.session import EngineSession
from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.repository.engines import RENEW_S, EngineHoldings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from concurrent.futures import Executor

    from loraplex_common.adapter_image import Geometry

    from loraplex_adapter_store.attach.messages import Hello
    from loraplex_adapter_store.images import ImageCache
    from loraplex_adapter_store.metrics import StoreMetrics

_log = get_logger()
BLOCK_MS: Final = 1000
RETRY_S: Final = 0.5
PUBLISH_PAUSE_S: Final = 0.1
"""Least time between two publications of one engine's holdings; residency may change with every request."""
MAX_BASES: Final = 64
"""Base models whose norms are kept."""
WeightNorms: TypeAlias = Mapping[tuple[int, str], float]
"""(layer, projection) -> Frobenius norm of the base's weight."""


class AttachedEngines:
    """Runs the sessions of this replica.

    Attributes:
        residency: Wakes at each change of what an engine holds, and when an engine comes or goes.
    """

    def __init__(
        self,
        client: keys.Client,
        holdings: EngineHoldings,
        images: ImageCache,
        metrics: StoreMetrics,
        executor: Executor,
    ) -> None:
        self._client = client
        self._holdings = holdings
        self._images = images
        self._metrics = metrics
        self._executor = executor
        self._sessions: dict[str, EngineSession] = {}
        self._norms: dict[
            str, WeightNorms
        ] = {}  # by fingerprint of the base; they outlive the engine that reported them
        self._owners: dict[str, str] = {}  # engine id -> name of the principal that attached it
        self.residency = WakeUp()

    def __contains__(self, engine_id: str) -> bool:
        return engine_id in self._sessions

    @asynccontextmanager
    async def attach(self, hello: Hello, owner: str) -> AsyncIterator[EngineSession]:
        """Run a session while its stream is open. A second stream of the same engine ends the first.

        Args:
            hello: How the engine introduces itself.
            owner: Name of the principal that attaches it; no other principal may use the engine id during the session.

        Raises:
            RoleForbiddenError: If another principal has attached an engine with this id.
        """
        older = self._sessions.get(hello.engine_id)
        if older is not None and self._owners[hello.engine_id] != owner:
            _log.warning("an engine id that is another's was refused", engine=hello.engine_id, principal=owner)
            raise RoleForbiddenError(
                f"engine {hello.engine_id} is attached by another principal: an engine speaks for itself alone",
                metadata={"engine_id": hello.engine_id},
            )
        session = EngineSession(hello, self._images, self._metrics, self._executor, self.residency.notify)
        if older is not None:
            older.end()
        self._owners[hello.engine_id] = owner
        self._sessions[hello.engine_id] = session
        self._metrics.engines.set(len(self._sessions))
        self._note_norms(hello)
        self.residency.notify()
        tasks = [
            asyncio.create_task(self._follow_hints(session), name=f"hints {hello.engine_id}"),
            asyncio.create_task(self._publish_holdings(session), name=f"holdings {hello.engine_id}"),
        ]
        _log.info("engine attached", engine=hello.engine_id, held=len(hello.held), shared_memory=session.shared_memory)
        session.fill_idle_room()
        try:
            yield session
        finally:
            await asyncio.shield(self._detach(session, tasks))

    def end_sessions(self) -> None:
        """End all streams; the engines attach to another replica."""
        for session in self._sessions.values():
            session.end()

    def held(self) -> dict[str, int]:
        """Return digest -> number of attached engines that hold it."""
        return dict(Counter(digest for session in self._sessions.values() for digest in session.held))

    def held_by_engine(self) -> dict[str, frozenset[str]]:
        """Return engine id -> digests that it holds, of the engines attached here."""
        return {engine_id: frozenset(session.held) for engine_id, session in self._sessions.items()}

    def leases(self) -> dict[str, int]:
        """Return digest -> leases on engines attached here."""
        total: Counter[str] = Counter()
        for session in self._sessions.values():
            for digest, image in session.held.items():
                total[digest] += image.num_leases
        return dict(total)

    def prefetch(self, engine_id: str, digest: str, wanted_in_ms: int) -> bool:
        """Offer an image, wanted in ``wanted_in_s``, to an engine; False if the engine is not attached here."""
        if (session := self._sessions.get(engine_id)) is None:
            return False
        session.prefetch(digest, wanted_in_ms / 1000)
        return True

    def expect(self, engine_id: str, digest: str) -> bool:
        """Offer an image that a label is about to move to; False if the engine is not attached here."""
        if (session := self._sessions.get(engine_id)) is None:
            return False
        session.expect(digest)
        return True

    async def drop(self, engine_id: str, digest: str) -> bool:
        """Tell an engine that an image is not wanted; False if the engine is not attached here."""
        if (session := self._sessions.get(engine_id)) is None:
            return False
        await session.drop(digest)
        return True

    def engines_for(self, base_fingerprint: str) -> list[str]:
        """Return the ids of attached engines that serve a base model."""
        return [i for i, session in self._sessions.items() if session.hello.base_fingerprint == base_fingerprint]

    def limits(self) -> tuple[RankLimits, ...]:
        """Return what limits the ranks that the engines attached here can take."""
        return tuple(
            RankLimits(
                name=f"engine {hello.engine_id}",
                base_fingerprint=hello.base_fingerprint,
                geometry=hello.geometry,
                max_rank=hello.max_rank,
                max_image_pages=hello.max_image_pages,
                max_added_tokens=hello.max_added_tokens,
            )
            for hello in (session.hello for session in self._sessions.values())
        )

    def geometries(self, base_fingerprint: str) -> tuple[Geometry, ...]:
        """Return the different geometries among the engines attached here that serve a base model."""
        hellos = (session.hello for session in self._sessions.values())
        return tuple(dict.fromkeys(each.geometry for each in hellos if each.base_fingerprint == base_fingerprint))

    def weight_norms(self, base_fingerprint: str) -> WeightNorms:
        """Return what an engine has reported of a base model's weights; empty if none has. From any thread."""
        return self._norms.get(base_fingerprint, {})

    def ids(self) -> list[str]:
        """Return the ids of all attached engines."""
        return list(self._sessions)

    def _note_norms(self, hello: Hello) -> None:
        if not hello.weight_norms or hello.base_fingerprint in self._norms:
            return
        while len(self._norms) >= MAX_BASES:
            del self._norms[next(iter(self._norms))]
        layers = hello.geometry.decoder_layers
        places = ((layer, each.name) for layer, offered in enumerate(layers) for each in offered)
        pairs = zip(places, hello.weight_norms, strict=True)
        self._norms[hello.base_fingerprint] = {place: norm for place, norm in pairs if math.isfinite(norm)}

    async def _detach(self, session: EngineSession, tasks: list[asyncio.Task[None]]) -> None:
        engine_id = session.hello.engine_id
        await cancel_and_wait(*tasks)
        await session.close()
        if self._sessions.get(engine_id) is session:
            del self._sessions[engine_id]
            del self._owners[engine_id]
            try:
                await self._holdings.withdraw(engine_id)
            except LoraplexError as error:
                _log.info("an engine's holdings expire by themselves", engine=engine_id, error=error.message)
        self._metrics.engines.set(len(self._sessions))
        self.residency.notify()
        _log.info("engine detached", engine=engine_id)

    async def _publish_holdings(self, session: EngineSession) -> None:
        while True:
            session.changed.clear()
            leases = {digest: image.num_leases for digest, image in session.held.items()}
            try:
                await self._holdings.publish(session.hello.engine_id, leases)
            except LoraplexError as error:
                _log.debug("holdings not published", engine=session.hello.engine_id, error=error.message)
            await asyncio.sleep(PUBLISH_PAUSE_S)
            try:
                async with asyncio.timeout(RENEW_S):
                    await session.changed.wait()
            except TimeoutError:
                continue  # unchanged: renew

    async def _follow_hints(self, session: EngineSession) -> None:
        """Act on hints for one engine; hints from before it attached, or lost with Valkey, are not made up for."""
        key = hints_key(session.hello.engine_id)
        position = ""
        while True:
            try:
                with keys.translated():
                    if not position:
                        newest = await self._client.xrevrange(key, count=1)
                        position = newest[0][0].decode() if newest else "0-0"
                    found = await self._client.xread({key: position}, count=100, block=BLOCK_MS)
            except LoraplexError as error:
                _log.debug("hints cannot be read", engine=session.hello.engine_id, error=error.message)
                position = ""
                await asyncio.sleep(RETRY_S)
                continue
            for _, entries in found or ():
                for entry_id, fields in entries:
                    position = entry_id.decode()
                    await self._act_on(session, fields)

    async def _act_on(self, session: EngineSession, fields: dict[bytes, bytes]) -> None:
        kind, digest = fields.get(b"kind", b"").decode(), fields.get(b"revision", b"").decode()
        if not is_digest(digest):
            _log.warning("a hint names no revision", engine=session.hello.engine_id, revision=digest[:80])
        elif kind == "prefetch":
            session.prefetch(digest, _wanted_in_s(fields))
        elif kind == "expect":
            session.expect(digest)
        elif kind == "evict":
            await session.drop(digest)
        else:
            _log.warning("unknown kind of hint", engine=session.hello.engine_id, kind=kind[:80])


def _wanted_in_s(fields: dict[bytes, bytes]) -> float:
    """Return in how many seconds a hint's image will be wanted; 0 if the hint gives no time, or an invalid one."""
    try:
        return max(0, int(fields.get(b"wanted_in_ms", b"0"))) / 1000
    except ValueError:
        _log.warning("a hint says no time", wanted_in_ms=fields[b"wanted_in_ms"][:80])
        return 0.0
