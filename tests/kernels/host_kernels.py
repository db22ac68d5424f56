"""A `KernelLibrary` whose kernels run on the CPU under sanitizers, so that the real launchers can be tested without a GPU."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from loraplex_kernels.compiler import SOURCES, headers, sources
from loraplex_kernels.fp8_params import TensorMap
from loraplex_kernels.module import KernelLibrary, dtype_defines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O0",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-Wno-unknown-pragmas",
)
COMPILER = shutil.which("g++")
# Executables and cubins by what they are made of: workers share them, and so do runs, since compiling is most of what
# these tests cost. `make clean` removes them.
BUILDS: Final = HERE.parents[1] / ".cache" / "kernel-builds"


@functools.cache
def _common_parts() -> bytes:
    """What every executable is made of: the compiler, its flags, the shim and all headers."""
    version = subprocess.run([str(COMPILER), "--version"], capture_output=True, check=True).stdout
    own = b"".join((HERE / name).read_bytes() for name in ("host_runner.cpp", "host_shim.h", "host_tma.h"))
    return b"\0".join((version, repr(FLAGS).encode(), own, repr(headers()).encode()))


def build_executable(name: str, macros: tuple[str, ...], directory: Path = BUILDS) -> Path:
    """Return a kernel's executable, compiling it unless an equal one is there; processes that need one wait for the first."""
    digest = hashlib.sha256(_common_parts() + sources()[name].read_bytes() + repr(macros).encode()).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    binary = directory / f"{name}-host-{digest[:32]}"
    if binary.exists():
        return binary
    with binary.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            command = [str(COMPILER), *FLAGS, f"-I{SOURCES}", f"-I{HERE}", *(f"-D{macro}" for macro in macros)]
            command += [f'-DKERNEL_FILE="{sources()[name]}"', f"-DKERNEL_NAME={name}", str(HERE / "host_runner.cpp")]
            partial = binary.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial)], check=True, timeout=120)
            partial.replace(binary)
    return binary


def pointer_fields(value: ctypes.Structure, at: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (byte offset, address) of every pointer in a struct that is not null."""
    for field in value._fields_:
        name, kind = field[0], field[1]
        where = at + getattr(type(value), name).offset
        if kind is ctypes.c_void_p:
            if getattr(value, name):
                yield where, getattr(value, name)
        elif kind is TensorMap:
            yield where, getattr(value, name).words[0]
        elif isinstance(kind, type) and issubclass(kind, ctypes.Structure):
            yield from pointer_fields(getattr(value, name), where)


def host_byte_map(matrix: torch.Tensor, box_rows: int) -> TensorMap:
    """Stands in for `tensor_map.byte_map`: what host_tma.h reads."""
    made = TensorMap()
    made.words[:4] = [matrix.data_ptr(), *matrix.shape, box_rows]
    return made


class HostKernel:
    """Stands in for `module.Kernel`."""

    def __init__(self, library: HostLibrary, build: Callable[[], Path], params: Any, block: int) -> None:
        self.params = params
        self._library, self._build, self._block = library, build, block

    def launch(self, x: int, y: int = 1, z: int = 1, *, stream: int | None = None) -> None:
        del stream
        buffers: list[torch.Tensor] = []
        relocations = []
        for at, address in pointer_fields(self.params):
            tensor = self._library.owner_of(address)
            if not any(tensor is known for known in buffers):
                buffers.append(tensor)
            index = next(i for i, known in enumerate(buffers) if known is tensor)
            relocations.append((at, index, address - tensor.data_ptr()))
        raw = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in buffers]
        call = struct.pack("<5q", x, y, z, self._block, ctypes.sizeof(self.params)) + bytes(self.params)
        call += struct.pack("<q", len(raw)) + b"".join(struct.pack("<q", data.size) + data.tobytes() for data in raw)
        call += struct.pack("<q", len(relocations)) + b"".join(struct.pack("<3q", *entry) for entry in relocations)
        binary = self._build()  # here, as a decoder loads more kernels than its steps launch
        request, reply = self._library.scratch / "call", self._library.scratch / "result"
        request.write_bytes(call)
        done = subprocess.run([binary, request, reply], capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise AssertionError(f"{binary.name} failed:\n{done.stderr[:4000]}")
        result, begin = reply.read_bytes(), 0
        for data in raw:
            data[:] = memoryview(result)[begin : begin + data.size]
            begin += data.size


class HostLibrary(KernelLibrary):
    """Compiles kernels with g++ into executables.

    Args:
        dtype: Element type.
        scratch: Directory for calls, one per test.
        max_shared_bytes: Shared memory of a CTA, as of the device that the kernels are compiled for.
    """

    def __init__(self, dtype: torch.dtype, scratch: Path, *, max_shared_bytes: int = 160 * 1024) -> None:
        self.device, self.dtype, self.arch, self.dependent = torch.device("cpu"), dtype, "host", False
        self.scratch, self._max_shared_bytes = scratch, max_shared_bytes
        self._device_index = -1
        self._tensors: list[torch.Tensor] = []

    @property
    def num_multiprocessors(self) -> int:
        return 2

    @property
    def max_shared_bytes(self) -> int:
        return self._max_shared_bytes

    def load(self, name: str, params: Any, block: int, *, defines: Sequence[str] = (), shared_bytes: int = 0) -> Any:
        build = functools.partial(build_executable, name, (*defines, *dtype_defines(self.dtype)))
        return HostKernel(self, build, params, block)

    def track(self, *tensors: torch.Tensor) -> None:
        """Make tensors known whose addresses reach kernels without `check`."""
        self._tensors += tensors

    def check(self, name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> int:
        if tensor.is_meta:  # torch numbers it as it numbers the CPU; a GPU's library finds it elsewhere
            raise ValueError(f"{name}: expected a tensor on {self.device}, got one on {tensor.device}")
        self._tensors = [known for known in self._tensors if known is not tensor] + [
            tensor
        ]  # `owner_of` finds the last
        return super().check(name, tensor, dtype, *shape)

    def owner_of(self, address: int) -> torch.Tensor:
        """Return the tensor an address points into."""
        for tensor in reversed(self._tensors):
            if tensor.data_ptr() <= address < tensor.data_ptr() + max(tensor.nbytes, 1):
                return tensor
        raise AssertionError(f"{address:#x} points into no tensor the launcher checked")
