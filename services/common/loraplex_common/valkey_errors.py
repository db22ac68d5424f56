"""The only place where failures of Valkey, and of its client library, become errors of the contract.

`TranslatingClient` raises nothing else, so no service has to know the library's exceptions: code that catches
`LoraplexError` catches all of them, and an RPC that ends with one answers with its class.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import redis.asyncio
import redis.asyncio.client
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from loraplex_common.errors import LoraplexError, SaturatedError, StoreUnavailableError
from loraplex_common.tasks import heard_cancellation

if TYPE_CHECKING:
    from collections.abc import Iterator

ALLOWED_WHEN_FULL: Final = "#!lua flags=allow-oom\n"
"""First line of a script that Valkey also runs when its memory is full: it frees memory or needs next to none."""

NO_CLUSTER: Final = (
    "a cluster is not served: name a single Valkey in --redis-url (cluster-enabled no), or Sentinels before several"
)
NO_ANSWER: Final = (RedisError, OSError)
"""What a client raises that does not translate: Valkey cannot be reached, or refuses."""
_FULL: Final = "Valkey is full: delete adapters or raise its maxmemory"
_DISK_FULL: Final = "Valkey takes no writes, because it cannot write to its disk: make room there"
# Errors by the first word of Valkey's answer; an answer that is not listed is passed on in Valkey's words.
_REMEDIES: Final = {
    "MISCONF": _DISK_FULL,
    "LOADING": "Valkey is loading its data",
    "READONLY": "this Valkey is a replica and takes no writes: name its primary in --redis-url",
    "MASTERDOWN": "this Valkey is a replica that has lost its primary",
    "NOREPLICAS": "Valkey takes no writes, because it has too few replicas",
    "BUSY": "Valkey is busy with a script",
    "CLUSTERDOWN": NO_CLUSTER,
    "TRYAGAIN": NO_CLUSTER,
    "MOVED": NO_CLUSTER,
    "ASK": NO_CLUSTER,
    "CROSSSLOT": NO_CLUSTER,
    "NOAUTH": "Valkey wants a password: give it with --redis-password-file",
    "WRONGPASS": "Valkey refuses user or password: see --redis-password-file and the user in --redis-url",
    "NOPERM": "Valkey's user of --redis-url may not do this",
}
# The library removes the word where it has a class for it.
_WORDS: Final[dict[type[Exception], str]] = {
    BusyLoadingError: "LOADING",
    ReadOnlyError: "READONLY",
    MasterDownError: "MASTERDOWN",
    ClusterDownError: "CLUSTERDOWN",
    TryAgainError: "TRYAGAIN",
    MovedError: "MOVED",
    AskError: "ASK",
    ClusterCrossSlotError: "CROSSSLOT",
    NoPermissionError: "NOPERM",
}


class ValkeyRefusedError(StoreUnavailableError):
    """Valkey answered a command with an error of its own.

    Attributes:
        answer: Text of the answer.
    """

    def __init__(self, message: str, answer: str) -> None:
        super().__init__(message, retry_after_s=5.0, metadata={"valkey": answer[:200]})
        self.answer = answer


@contextmanager
def translated() -> Iterator[None]:
    """Turn Valkey's failures inside the block into errors of the contract.

    Raises:
        SaturatedError: If Valkey is full.
        ValkeyRefusedError: If Valkey answers with an error.
        StoreUnavailableError: If Valkey cannot be reached; RetryInfo says one second.
    """
    try:
        yield
    except (RedisError, OSError) as error:
        raise _error(error) from error


def _error(error: RedisError | OSError) -> LoraplexError:
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "OOM command not allowed" in text:
        return SaturatedError(_FULL, retry_after_s=10.0, metadata={"valkey": text[:200]})
    if word := _first_word(error, text):
        return ValkeyRefusedError(_REMEDIES.get(word, f"Valkey refused a command: {text[:200]}"), text)
    if isinstance(error, MasterNotFoundError):
        return StoreUnavailableError(
            "no Sentinel of --redis-url knows a primary of that name that is up; streams on resident adapters go on",
            retry_after_s=1.0,
        )
    return StoreUnavailableError(
        "the adapter store cannot reach its Valkey; streams on resident adapters go on", retry_after_s=1.0
    )


def _first_word(error: Exception, text: str) -> str:
    """Return the first word of the answer that an error stands for; empty if there was no answer."""
    if isinstance(error.__cause__, AuthenticationError):
        error = error.__cause__  # the library raises this after its retries
    for cls, word in _WORDS.items():
        if isinstance(error, cls):
            return word
    if isinstance(error, AuthenticationError):
        # The library begins with HELLO, which a server that requires a password answers in words of its own.
        return "NOAUTH" if "required" in text or "already authenticated" in text else "WRONGPASS"
    if isinstance(error, RedisConnectionError | RedisTimeoutError | OSError):
        return ""
    # A pipeline wraps the answer: Command # 1 (SET a b) of pipeline caused error: ('MISCONF ...',)
    answer = text.partition("of pipeline caused error: ")[2].lstrip("('\"") or text
    return answer.split(" ", 1)[0] or "ERR"


class TranslatingClient(redis.asyncio.Redis):
    """`redis.asyncio.Redis` whose commands raise only errors of the contract, and none of the library's.

    It does not swallow its caller's cancellation either: the library sends through Python 3.11's `wait_for`, which
    does.
    """

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run one command.

        Raises:
            LoraplexError: In the cases of `translated`.
        """
        with translated(), heard_cancellation():
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> _TranslatingPipeline:
        """Return a pipeline whose `execute` raises errors of the contract."""
        return _TranslatingPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _TranslatingPipeline(redis.asyncio.client.Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        with translated(), heard_cancellation():
            found: list[Any] = await super().execute(raise_on_error)
            return found
