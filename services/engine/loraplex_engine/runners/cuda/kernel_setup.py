"""What a runner makes first: the library of kernels, and the tables of adapters that they read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_kernels.lora.tables import AdapterTables
from loraplex_kernels.module import KernelLibrary, device_arch, has_dependent_launch

from loraplex_engine.model.weights import DTYPES
from loraplex_engine.runners.cuda.kernel_limits import tile_capacity

if TYPE_CHECKING:
    import torch
    from loraplex_common.adapter_image import Geometry

    from loraplex_engine.runners.runner_config import RunnerConfig


def make_library(config: RunnerConfig, device: torch.device) -> KernelLibrary:
    """Return the kernels for a device and element type."""
    dependent = config.dependent_launch
    if dependent is None:
        dependent = has_dependent_launch(config.arch or device_arch(device))
    dtype = DTYPES[config.limits.pool.dtype]
    return KernelLibrary(device, dtype, arch=config.arch, dependent=dependent, jitter=config.jitter)


def make_tables(config: RunnerConfig, geometry: Geometry, device: torch.device) -> AdapterTables:
    """Return the tables of as many adapters as may be resident."""
    max_adapters = config.limits.max_resident_adapters
    capacity = tile_capacity(geometry, num_pages=config.limits.num_pages, max_adapters=max_adapters)
    return AdapterTables(geometry, max_adapters=max_adapters, tile_capacity=capacity, device=device)
