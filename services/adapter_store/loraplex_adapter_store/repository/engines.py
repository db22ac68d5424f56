"""Which engine holds and leases which revision; each store replica reports the engines attached to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.registry import EngineRecord, RegistryReader, hints_key

from loraplex_adapter_store.repository import keys, scripts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


ATTACHED: Final = "loraplex:store:attached"
"""Set of ids of engines that some replica has attached; the hash of an engine that vanished expires."""
TTL_S: Final = 30
RENEW_S: Final = 10.0
HINTS_KEPT: Final = 1000
HINTS_TTL_S: Final = 600


class EngineHoldings:
    """Shares residency between replicas, and passes hints to the replica that an engine is attached to."""

    def __init__(self, client: keys.Client) -> None:
        self._client = client
        self._registry = RegistryReader(client)

    async def publish(self, engine_id: str, leases: Mapping[str, int]) -> None:
        """Publish what an engine holds: digest -> leases. The record lasts `TTL_S` unless repeated."""
        key = keys.held(engine_id)
        with keys.translated():
            entries = [word for digest, count in leases.items() for word in (digest, count)]
            await self._client.eval(scripts.PUBLISH, 1, key, TTL_S, *entries)
            await self._client.eval(scripts.ATTACH, 1, ATTACHED, engine_id)

    async def withdraw(self, engine_id: str) -> None:
        """Publish that an engine has gone."""
        with keys.translated():
            await self._client.delete(keys.held(engine_id))
            await self._client.srem(ATTACHED, engine_id)

    async def leases(self, *, without: Collection[str] = ()) -> dict[str, int]:
        """Return every held digest with its leases, summed over engines except those in ``without``."""
        total: dict[str, int] = {}
        with keys.translated():
            for engine_id in await self._client.smembers(ATTACHED):
                if engine_id.decode() in without:
                    continue
                entries = await self._client.hgetall(keys.held(engine_id.decode()))
                for digest, count in entries.items():
                    total[digest.decode()] = total.get(digest.decode(), 0) + int(count)
        return total

    async def held_by_engine(
        self, digests: Sequence[str], *, without: Collection[str] = ()
    ) -> dict[str, frozenset[str]]:
        """Return engine id -> those of some digests that it holds, of all engines but those in ``without``."""
        with keys.translated():
            ids = [raw.decode() for raw in await self._client.smembers(ATTACHED)]
            others = [engine_id for engine_id in ids if engine_id not in without]
            if not others:
                return {}
            async with self._client.pipeline(transaction=False) as pipeline:
                for engine_id in others:
                    pipeline.hmget(keys.held(engine_id), list(digests))
                found = await pipeline.execute()
        return {
            engine_id: frozenset(digest for digest, leases in zip(digests, row, strict=True) if leases is not None)
            for engine_id, row in zip(others, found, strict=True)
        }

    async def registered(self) -> list[EngineRecord]:
        """Return the engines in the shared registry whose lease is valid."""
        with keys.translated():
            return list((await self._registry.read()).values())

    async def hint(self, engine_id: str, kind: str, revision: str, wanted_in_ms: int = 0) -> None:
        """Add a hint to an engine's stream; the replica it is attached to acts on it."""
        fields: dict[bytes | str, bytes | str | int] = {
            "kind": kind,
            "revision": revision,
            "wanted_in_ms": wanted_in_ms,
        }
        with keys.translated():
            async with self._client.pipeline(transaction=False) as pipeline:
                pipeline.xadd(hints_key(engine_id), fields, maxlen=HINTS_KEPT, approximate=True)
                pipeline.expire(hints_key(engine_id), HINTS_TTL_S)  # otherwise hints for dead engines stay for ever
                await pipeline.execute()
