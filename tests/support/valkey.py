"""A real Valkey server for tests: one per pytest worker, a database of its own per test."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import TYPE_CHECKING

import redis
from loraplex_common.valkey import EmbeddedValkey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NUM_DATABASES = 16  # Valkey's default
_databases = itertools.cycle(range(NUM_DATABASES))


@contextmanager
def running_server(data_dir: Path) -> Iterator[EmbeddedValkey]:
    """Run a server that ends with the block."""
    with EmbeddedValkey(data_dir, max_memory_bytes=2**30) as server:
        yield server


def fresh_database(server: EmbeddedValkey) -> str:
    """Return the URL of an empty database of the server."""
    url = f"{server.url}?db={next(_databases)}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url
