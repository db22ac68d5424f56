from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from typing import TYPE_CHECKING

from kernels.host_kernels import COMPILER, HostLibrary
from loraplex_kernels.compiler import CubinCache

if TYPE_CHECKING:
    from pathlib import Path

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]


@pytest.fixture(scope="session")
def build_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all workers of a session, so that each kernel is compiled once."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen") else base
    directory = shared / "kernel-builds"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def cubins(build_directory: Path) -> CubinCache:
    return CubinCache(build_directory)


@pytest.fixture
def host_library(build_directory: Path, tmp_path: Path) -> MakeHostLibrary:
    """Make a library that runs kernels on the CPU under sanitizers."""
    if COMPILER is None:
        pytest.skip("no g++: the host shim cannot be built")
    torch.set_num_threads(1)
    return lambda dtype: HostLibrary(dtype, build_directory, tmp_path)
