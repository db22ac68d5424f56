"""A real Valkey for the tests of the adapter store: one server per test file, an empty database per test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.valkey import fresh_database, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_common.valkey import EmbeddedValkey


@pytest.fixture(scope="module")
def store_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A server for one file."""
    with running_server(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture
def redis_url(store_valkey: EmbeddedValkey) -> str:
    """The URL of an empty database."""
    return fresh_database(store_valkey)
