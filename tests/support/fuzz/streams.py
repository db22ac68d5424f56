"""Streams of strangers: uploads and pushes of any bytes at a whole store over gRPC."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.kept_status import answer_of
from loraplex_common.rpc_errors import error_from_rpc
from support.adapters import Recipe, adapter_files
from support.fuzz.mutations import mutated_bytes, mutated_messages
from support.pushes import push_messages
from support.store_rig import StoreClient, tiny_base_dir, upload_parts

if TYPE_CHECKING:
    from random import Random

SERVICE: Final = "/loraplex.v1.AdapterStoreService"
NUMBERS: Final = (0, 1, 2, 2**31, 2**53, 2**63 - 1)
TEXTS: Final = (
    "",
    "a",
    "../x",
    "a" * 600,
    "\x00",
    "F32",
    "BF16",
    "I8",
    "model.sig",
    "adapter_config.json",
    "tokenizer.json",
)


class StreamTargets:
    """Sends streams to a store.

    Args:
        client: The store.
    """

    def __init__(self, client: StoreClient) -> None:
        self._client = client
        files = [adapter_files(tiny_base_dir(), Recipe(seed=seed)) for seed in range(2)]
        self._uploads = [list(upload_parts("a", each, part_bytes=20_000)) for each in files]
        self._pushes = [push_messages("b", seed) for seed in range(2)]
        for first, *_ in self._pushes:
            first.header.request_id = ""  # each push is a new one

    async def send(self, rng: Random) -> str:
        """Send one stream; return how it ended.

        Raises:
            AssertionError: If the store met a bug.
        """
        is_push = rng.random() < 0.5
        method, streams = ("PushAdapter", self._pushes) if is_push else ("UploadAdapter", self._uploads)
        messages: list[Any] = list(rng.choice(streams))
        if rng.random() < 0.5:
            messages[0] = _other_header(rng, messages[0])
            wire = [message.SerializeToString() for message in messages]
        else:
            others = [message.SerializeToString() for stream in streams for message in stream]
            others.append(mutated_bytes(rng, others[0], others))
            wire = mutated_messages(rng, [message.SerializeToString() for message in messages], others)
        return await self._sent(method, wire)

    async def check_alive(self) -> None:
        """Raise unless a sound upload is taken."""
        response = await self._client.upload_recipe("sound")
        assert response.revision.revision

    async def _sent(self, method: str, messages: list[bytes]) -> str:
        call: Any = self._client.channel.stream_unary(f"{SERVICE}/{method}")
        try:
            await answer_of(call(iter(messages), timeout=60))
        except grpc.aio.AioRpcError as error:
            failure = error_from_rpc(error)
            undecodable = error.code() is grpc.StatusCode.INTERNAL and "deserializ" in (error.details() or "")
            assert undecodable or failure.reason not in ("INTERNAL", "UNKNOWN", "DEADLINE"), failure.message
            return failure.reason
        return "OK"


def _other_header(rng: Random, message: Any) -> Any:
    """Return a first message with one to three other values in it."""
    other = type(message).FromString(message.SerializeToString())
    for _ in range(rng.randint(1, 3)):
        header = other.header
        parts: Any = header.tensors if isinstance(other, pb.PushAdapterRequest) else header.files
        part = rng.choice(parts) if parts else header
        holder = part if rng.random() < 0.6 else header
        field = rng.choice(list(holder.DESCRIPTOR.fields))
        if field.message_type is not None:
            if field.name == "ready_timeout":
                header.ready_timeout.seconds = rng.choice((-1, 0, 1, 2**40))
            elif len(parts) > 1:
                parts.add().CopyFrom(rng.choice(parts)) if rng.random() < 0.5 else parts.pop()
        elif field.name == "shape":
            part.shape[:] = [rng.choice(NUMBERS) for _ in range(rng.randint(0, 10))]
        elif field.is_repeated:
            getattr(holder, field.name)[:] = [rng.choice(TEXTS) for _ in range(rng.randint(0, 10))]
        elif field.type == field.TYPE_STRING:
            setattr(holder, field.name, rng.choice(TEXTS))
        elif field.type == field.TYPE_BYTES:
            setattr(holder, field.name, mutated_bytes(rng, getattr(holder, field.name), [b"{}"]))
        elif field.type == field.TYPE_BOOL:
            setattr(holder, field.name, rng.random() < 0.5)
        else:
            setattr(holder, field.name, rng.choice(NUMBERS))
    return other


async def send_many(targets: StreamTargets, rngs: list[Random]) -> list[str | BaseException]:
    """Send several streams at once."""
    return await asyncio.gather(*(targets.send(rng) for rng in rngs), return_exceptions=True)
