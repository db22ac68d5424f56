"""Keys in Valkey that more than one service reads, and the records behind them.

All other keys in Valkey belong to one service each, which keeps their names to itself.
"""

from __future__ import annotations

import json
import time
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger
from loraplex_common.version import package_version

if TYPE_CHECKING:
    from collections.abc import Callable

ENGINES_KEY: Final = "loraplex:engines"
"""Sorted set of engine ids, scored by lease expiry (unix seconds). An engine past its score is gone."""

ENGINE_LEASE_S: Final = 10.0
ENGINE_RENEW_S: Final = 2.0
ENGINE_RECORD_S: Final = 3600.0
"""How long a record outlives its lease: a gateway that starts while no lease can be renewed still finds the engines."""

MAX_COUNT: Final = 2**53
"""Largest number in a record: above it, readers of JSON differ."""
MAX_REMEMBERED: Final = 1000
_NO_KEY: Final = "loraplex:nothing"

_log = get_logger()


class EngineRecordError(ValueError):
    """An entry of the engine registry that this version cannot read; the message says what is wrong with it."""


def engine_key(engine_id: str) -> str:
    """String key of an engine's record (`EngineRecord` JSON). The lease is not its expiry but the score in `ENGINES_KEY`."""
    return f"loraplex:engine:{engine_id}"


def hints_key(engine_id: str) -> str:
    """Capped stream of prefetch and eviction hints for one engine: fields ``kind``, ``revision``, ``wanted_in_ms``."""
    return f"loraplex:hints:{engine_id}"


def claim_key(tenant: str, request_id: str) -> str:
    """String key that claims (tenant, request_id) for one gateway while the request runs.

    Both may contain colons; the tenant's length marks its end, so that no two pairs have one key.
    """
    return f"loraplex:claim:{len(tenant)}:{tenant}:{request_id}"


def gateway_key(gateway_id: str) -> str:
    """String key that exists while a gateway lives: claims of a gateway without one are void."""
    return f"loraplex:gateway:{gateway_id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """What gateways need to find an engine and to know what it serves.

    Attributes:
        target: gRPC target, ``host:port``.
        base_model: Served name of the base model.
        max_image_pages: Pages of the largest adapter image that the pool can ever hold.
        is_draining: True once it takes no new requests.
        constrains: Whether it knows constraints on outputs: structured output and sequences that are never drawn. Engines
            of earlier versions pass over what they do not know.
        sums_adapters: Whether it adds up several adapters of one request: others would compute the first of them alone.
        numerics: What loading did to the base model's numbers (`numerics.Numerics`); empty of earlier versions.
    """

    engine_id: str
    target: str
    base_model: str
    base_fingerprint: str
    base_aliases: tuple[str, ...] = ()
    max_model_len: int
    vocab_size: int
    num_pages: int
    block_tokens: int
    page_bytes: int
    max_image_pages: int
    is_draining: bool = False
    constrains: bool = False
    sums_adapters: bool = False
    numerics: str = ""
    version: str = field(default_factory=package_version)

    def to_json(self) -> str:
        """Encode for Valkey."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, data: str | bytes) -> EngineRecord:
        """Decode what `to_json` wrote; fields of a newer version are ignored.

        Raises:
            EngineRecordError: If the text is anything else.
        """
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise EngineRecordError(f"it is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise EngineRecordError(f"it is {type(found).__name__}, not an object")
        values: dict[str, Any] = {}
        for each in fields(cls):
            if each.name in found:
                values[each.name] = _DECODERS[str(each.type)](each.name, found[each.name])
            elif each.default is MISSING and each.default_factory is MISSING:
                raise EngineRecordError(f"{each.name} is missing")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class RegistryView:
    """The content of the registry.

    Attributes:
        leased: Engines whose lease is valid, by id.
        lapsed: If Valkey takes no writes: engines whose lease ran out, perhaps because it could not be renewed.
        takes_writes: Whether a lease can be renewed now; only checked if one ran out.
    """

    leased: dict[str, EngineRecord]
    lapsed: dict[str, EngineRecord] = field(default_factory=dict)
    takes_writes: bool = True


class RegistryReader:
    """Reads the engine registry for every service; an entry that cannot be read is left out, with one log line.

    Args:
        client: `redis.asyncio.Redis` that answers in bytes.
        clock: Unix seconds.
    """

    def __init__(self, client: Any, *, clock: Callable[[], float] = time.time) -> None:
        self._client = client
        self._clock = clock
        self._unreadable: dict[bytes, str] = {}

    async def read(self) -> dict[str, EngineRecord]:
        """Return the engines whose lease is valid, by id.

        Raises:
            LoraplexError: If Valkey cannot be read.
        """
        # Scores are lease expiries: an engine past its score is gone, even if its entry has not been removed yet.
        return await self._records(await self._client.zrangebyscore(ENGINES_KEY, self._clock(), "+inf"))

    async def view(self) -> RegistryView:
        """Return the engines whose lease is valid; if leases cannot be renewed, also those whose lease ran out.

        Raises:
            LoraplexError: If Valkey cannot be read.
        """
        now = self._clock()
        lapsed: list[bytes] = await self._client.zrangebyscore(ENGINES_KEY, now - ENGINE_RECORD_S, f"({now}")
        leased = await self.read()
        if not lapsed or await self._takes_writes():
            return RegistryView(leased)
        return RegistryView(leased, await self._records(lapsed), takes_writes=False)

    async def _takes_writes(self) -> bool:
        """Return whether an engine could renew its lease; a full memory does not prevent that, see `Registration`."""
        try:
            await self._client.unlink(_NO_KEY)  # for Valkey a write, but it changes nothing
        except LoraplexError:
            return False
        return True

    async def _records(self, members: list[bytes]) -> dict[str, EngineRecord]:
        records: dict[str, EngineRecord] = {}
        named = {member: engine_id for member in members if (engine_id := self._id(member)) is not None}
        if not named:
            return records
        values = await self._client.mget([engine_key(engine_id) for engine_id in named.values()])
        for (member, engine_id), value in zip(named.items(), values, strict=True):
            if value is None:
                continue  # its record expired in between
            try:
                record = EngineRecord.from_json(value)
                if record.engine_id != engine_id:
                    raise EngineRecordError(f"it is about another engine, {record.engine_id}")
            except EngineRecordError as error:
                self._skip(member, str(error))
            else:
                records[engine_id] = record
        return records

    def _id(self, member: bytes) -> str | None:
        try:
            return member.decode()
        except UnicodeDecodeError as error:
            self._skip(member, str(error))
            return None

    def _skip(self, member: bytes, cause: str) -> None:
        """Log what is wrong with an entry, once until its fault changes."""
        if self._unreadable.get(member) == cause:
            return
        if len(self._unreadable) >= MAX_REMEMBERED:
            self._unreadable.clear()
        self._unreadable[member] = cause
        _log.error(
            "an engine's record cannot be read; it is passed over",
            engine_id=member.decode(errors="replace"),
            cause=cause,
        )


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():  # a lone surrogate is not printable
        raise EngineRecordError(f"{name} is no text")
    return value


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise EngineRecordError(f"{name} is no count")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise EngineRecordError(f"{name} is neither true nor false")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise EngineRecordError(f"{name} is no list")
    return tuple(_text(name, item) for item in value)


# Readers by the type of each field of `EngineRecord`, as written there.
_DECODERS: Final[dict[str, Callable[[str, Any], Any]]] = {
    "str": _text,
    "int": _count,
    "bool": _flag,
    "tuple[str, ...]": _texts,
}
