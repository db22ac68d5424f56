from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from typing import TYPE_CHECKING

from kernels.host_kernels import BUILDS, COMPILER, HostLibrary
from loraplex_kernels.compiler import CubinCache

if TYPE_CHECKING:
    from pathlib import Path

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]


@pytest.fixture(scope="session")
def cubins() -> CubinCache:
    return CubinCache(BUILDS)


@pytest.fixture
def host_library(tmp_path: Path) -> MakeHostLibrary:
    """Make a library that runs kernels on the CPU under sanitizers."""
    if COMPILER is None:
        pytest.skip("no g++: the host shim cannot be built")
    torch.set_num_threads(1)
    return lambda dtype: HostLibrary(dtype, tmp_path)
