"""Fixtures and skip rules for every test; nothing clever."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, settings
from support.valkey import fresh_database, running_server

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from loraplex_common.valkey import EmbeddedValkey

# By default an example that takes more than 200 ms fails its test, and on a busy machine any process is left waiting for longer.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


@functools.cache
def has_gpu() -> bool:
    """True if an NVIDIA driver answers; asks without importing torch."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no reference cycles among what files import: millions of objects, all of them to stay.

    Afterwards a search leaves them out; one through them takes half a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


FIRST: Final = frozenset({"test_soak.py"})
"""Files that wait for minutes: a worker that comes to one last leaves the others without work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)
    for item in items:
        if item.get_closest_marker("gpu") is not None and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: none answers to nvidia-smi"))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Keep parallel workers from fighting over cores; torch stays unimported where a test does not need it."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep client profiles of the stacks under test away from those of the user that runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A real Valkey server, one per worker."""
    with running_server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def valkey_url(valkey_server: EmbeddedValkey) -> str:
    """URL of an empty database, this test's own (until 16 tests later)."""
    return fresh_database(valkey_server)
