"""Loads compiled kernels and launches them on torch's streams, capturable in CUDA graphs.

A kernel takes one struct by value. Its ctypes mirror is allocated once per `Kernel`, so a launch only sets fields and
makes one driver call: the driver copies the struct before it returns.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import torch
from cuda.bindings import driver

from loraplex_kernels.compiler import Build, CubinCache

if TYPE_CHECKING:
    from collections.abc import Sequence

P = TypeVar("P", bound=ctypes.Structure)
DEPENDENT_LAUNCH_MACRO: Final = "LORAPLEX_PDL"
JITTER_MACRO: Final = "LORAPLEX_JITTER"


class DriverError(RuntimeError):
    """The CUDA driver refused a call; the message names the call and the driver's reason."""


def _check(result: Any, what: str) -> None:
    if result != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(result)
        raise DriverError(f"{what}: {result.name} ({text.decode() if text else 'no description'})")


def device_arch(device: torch.device) -> str:
    """Return the exact architecture of a GPU, e.g. ``sm_90a``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def has_dependent_launch(arch: str) -> bool:
    """Tell whether a target supports programmatic dependent launch: ``sm_90`` and up, as machine code or PTX."""
    return int("".join(filter(str.isdigit, arch))) >= 90


def has_clusters(arch: str) -> bool:
    """Tell whether a target runs clusters of CTAs: ``sm_90`` and up, and the CPU that stands for one in tests."""
    return not arch.startswith(("sm_8", "compute_8"))


class Kernel(Generic[P]):
    """A kernel on the current device, with its parameter struct.

    Attributes:
        params: Set its fields, then call `launch`.
    """

    __slots__ = (
        "_args",
        "_args_address",
        "_block",
        "_config",
        "_device_index",
        "_function",
        "_module",
        "_streams",
        "name",
        "params",
    )

    def __init__(self, name: str, image: bytes, params: P, block: int, shared_bytes: int, *, dependent: bool) -> None:
        self.name = name
        self.params = params
        self._block = block
        self._device_index = torch.cuda.current_device()
        self._args = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self._args_address = ctypes.addressof(self._args)
        self._streams: dict[int, Any] = {}
        result, self._module = driver.cuModuleLoadData(image)
        _check(result, f"{name}: load")
        result, self._function = driver.cuModuleGetFunction(self._module, name.encode())
        _check(result, f"{name}: find entry point")
        if shared_bytes > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(
                driver.cuFuncSetAttribute(self._function, attribute, shared_bytes)[0],
                f"{name}: {shared_bytes} B shared",
            )
        self._config = self._make_config(shared_bytes, dependent)

    def _make_config(self, shared_bytes: int, dependent: bool) -> Any:
        config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = self._block, 1, 1
        config.sharedMemBytes = shared_bytes
        if dependent:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        return config

    def launch(self, x: int, y: int = 1, z: int = 1, *, stream: int | None = None) -> None:
        """Launch ``x * y * z`` blocks with the current `params`; an empty grid launches nothing.

        Args:
            x: Blocks along x.
            y: Blocks along y.
            z: Blocks along z.
            stream: Raw stream; torch's current stream if unset.

        Raises:
            DriverError: If the driver refuses the launch.
        """
        if x * y * z == 0:
            return
        raw = torch._C._cuda_getCurrentRawStream(self._device_index) if stream is None else stream
        handle = self._streams.get(raw)
        if handle is None:
            handle = self._streams[raw] = driver.CUstream(raw)
        config = self._config
        if config.numAttrs == 0:
            (result,) = driver.cuLaunchKernel(
                self._function, x, y, z, self._block, 1, 1, config.sharedMemBytes, handle, self._args_address, 0
            )
        else:
            config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
            config.hStream = handle
            (result,) = driver.cuLaunchKernelEx(config, self._function, self._args_address, 0)
        if result != driver.CUresult.CUDA_SUCCESS:
            _check(result, f"{self.name}: launch ({x}, {y}, {z}) x {self._block}")


class KernelLibrary:
    """Compiles and loads kernels for one device and element type.

    Args:
        device: A CUDA device; must be current whenever a kernel is launched.
        dtype: Element type of activations, weights and pages: bfloat16 or float32.
        cache: Cache of cubins.
        arch: Target; the device's own if unset. ``compute_80`` runs the sm_80 code on a newer device.
        dependent: Launch with programmatic dependent launch (sm_90 and up).
        jitter: Let warps idle at random, so that races show; for tests.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        cache: CubinCache | None = None,
        arch: str | None = None,
        dependent: bool = False,
        jitter: bool = False,
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"kernels compute in bfloat16 or float32, not {dtype}")
        self.device = device
        self._device_index = device.index if device.index is not None else torch.cuda.current_device()
        self.dtype = dtype
        self.arch = arch or device_arch(device)
        self.dependent, self.jitter = dependent, jitter
        self._cache = cache or CubinCache()
        torch.zeros(1, device=device)  # makes torch's primary context current

    @property
    def num_multiprocessors(self) -> int:
        """Multiprocessors of the device."""
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    @property
    def max_shared_bytes(self) -> int:
        """Most shared memory that a CTA may have on the device."""
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        result, most = driver.cuDeviceGetAttribute(attribute, self._device_index)
        _check(result, "shared memory of a block")
        return int(most)

    def load(
        self, name: str, params: P, block: int, *, defines: Sequence[str] = (), shared_bytes: int = 0
    ) -> Kernel[P]:
        """Compile (or find in the cache) and load one kernel.

        Raises:
            CompileError: If NVRTC refuses it; the message has NVRTC's log.
            DriverError: If the image does not load on this device.
        """
        build = Build(name=name, defines=(*defines, *dtype_defines(self.dtype), *self._launch_defines()))
        program = self._cache.get(build, self.arch)
        return Kernel(name, program.image, params, block, shared_bytes, dependent=self.dependent)

    def _launch_defines(self) -> tuple[str, ...]:
        return (DEPENDENT_LAUNCH_MACRO,) * self.dependent + (JITTER_MACRO,) * self.jitter

    def check(self, name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> int:
        """Return a tensor's address after checking dtype, device, shape and contiguity; a size of -1 matches any.

        Raises:
            ValueError: If one differs; names the tensor and what was expected.
        """
        # Every launch passes here, so these are the cheapest tests, without temporary objects.
        fits = tensor.dtype is dtype and tensor.is_contiguous() and tensor.get_device() == self._device_index
        actual = tensor.shape
        if fits and len(actual) == len(shape):
            for want, size in zip(shape, actual):  # noqa: B905  the lengths are equal; strict costs time
                if want not in (-1, size):
                    fits = False
                    break
        else:
            fits = False
        if not fits:
            raise ValueError(
                f"{name}: expected contiguous {dtype} {list(shape)} on {self.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        return tensor.data_ptr()


def dtype_defines(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the macros that choose a kernel's element type."""
    return ("LORAPLEX_FP32",) if dtype == torch.float32 else ()
