"""What kernel tests on the GPU share: libraries of every kind, tensors on the device, tolerances."""

from __future__ import annotations

import functools

import torch
from loraplex_kernels.module import KernelLibrary, device_arch

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-3}  # bf16: rounding of the result alone is 1.7e-3
ATTENTION_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-3}  # and p is rounded to bf16


@functools.cache
def library(dtype: torch.dtype, arch: str | None = None, *, dependent: bool = False) -> KernelLibrary:
    return KernelLibrary(torch.device("cuda", 0), dtype, arch=arch, dependent=dependent)


def libraries(dtype: torch.dtype) -> list[KernelLibrary]:
    """The device's own code, the same with dependent launch, and the sm_80 code assembled by the driver."""
    native = device_arch(torch.device("cuda", 0))
    dependent = [library(dtype, dependent=True)] if native.startswith("sm_9") else []
    return [library(dtype), *dependent, library(dtype, "compute_80")]


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def ints(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device="cuda")
