"""What the store's rates stand beside: a copy of memory, sha256, a plain gRPC stream, and redis-py's GET."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import redis

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from multiprocessing.connection import Connection

METHOD = "/bench.Bytes/Stream"
MESSAGE_BYTES = 1 << 20


def best_rate(num_bytes: int, work: Callable[[], object], repeats: int = 5) -> float:
    """Return the best of several rates, in GB/s."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return num_bytes / min(seconds) / 1e9


def memcpy_rate(num_bytes: int) -> float:
    """Return the rate of one thread's copy between two buffers that have been touched, in GB/s."""
    source, target = np.ones(num_bytes, dtype=np.uint8), np.zeros(num_bytes, dtype=np.uint8)
    return best_rate(num_bytes, lambda: np.copyto(target, source))


def hash_rate(num_bytes: int, num_threads: int) -> float:
    """Return the rate of a pool of threads that hash pieces of 1 MiB, in GB/s."""
    data = np.ones(num_bytes, dtype=np.uint8).data
    pieces = [data[start : start + MESSAGE_BYTES] for start in range(0, num_bytes, MESSAGE_BYTES)]
    with ThreadPoolExecutor(num_threads) as pool:
        return best_rate(num_bytes, lambda: list(pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces)))


def get_rate(url: str, key_sets: Sequence[Sequence[str]]) -> float:
    """Return the rate at which redis-py gets values one after another, one process for each set of keys, in GB/s."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in key_sets]
    children = [
        context.Process(target=_get_child, args=(url, list(keys), pipe[1]))
        for keys, pipe in zip(key_sets, pairs, strict=True)
    ]
    for child in children:
        child.start()
    for ours, _ in pairs:
        ours.recv()
    rates: list[float] = []
    for _ in range(4):
        began = time.perf_counter()
        for ours, _ in pairs:
            ours.send("go")
        num_bytes = sum(ours.recv() for ours, _ in pairs)
        rates.append(num_bytes / (time.perf_counter() - began) / 1e9)
    for ours, _ in pairs:
        ours.send("")
    for child in children:
        child.join()
    return max(rates)


def _get_child(url: str, keys: list[str], pipe: Connection) -> None:
    with redis.Redis.from_url(url) as client:
        client.ping()
        pipe.send(0)
        while pipe.recv():
            pipe.send(sum(len(client.get(key) or b"") for key in keys))


async def grpc_rate(num_bytes: int) -> float:
    """Return the rate of a plain gRPC stream of messages of 1 MiB from another process, in GB/s."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_grpc_child, args=(num_bytes, theirs), daemon=True)
    child.start()
    port = await asyncio.to_thread(ours.recv)
    rates: list[float] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_stream(METHOD)
        for _ in range(3):
            began, received = time.perf_counter(), 0
            async for message in call(b""):
                received += len(message)
            rates.append(received / (time.perf_counter() - began) / 1e9)
    child.terminate()
    child.join()
    return max(rates)


def _grpc_child(num_bytes: int, pipe: Connection) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(num_bytes, pipe))


async def _serve(num_bytes: int, pipe: Connection) -> None:
    async def stream(_: bytes, __: object) -> AsyncIterator[bytes]:
        message = bytes(MESSAGE_BYTES)
        for _start in range(0, num_bytes, MESSAGE_BYTES):
            yield message

    server = grpc.aio.server()
    handler: Any = grpc.unary_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bytes", {"Stream": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    await server.wait_for_termination()
