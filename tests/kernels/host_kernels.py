"""A `KernelLibrary` whose kernels run on the CPU under sanitizers, so that the real launchers can be tested without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loraplex_kernels.compiler import SOURCES, sources
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


def pointer_fields(value: ctypes.Structure, at: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (byte offset, address) of every pointer in a struct that is not null."""
    for field in value._fields_:
        name, kind = field[0], field[1]
        where = at + getattr(type(value), name).offset
        if kind is ctypes.c_void_p:
            if getattr(value, name):
                yield where, getattr(value, name)
        elif isinstance(kind, type) and issubclass(kind, ctypes.Structure):
            yield from pointer_fields(getattr(value, name), where)


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
    """Compiles kernels with g++ into executables kept in a directory.

    Args:
        dtype: Element type.
        directory: For executables (shared by tests) and `scratch` for calls (one per test).
    """

    def __init__(self, dtype: torch.dtype, directory: Path, scratch: Path) -> None:
        self.device, self.dtype, self.arch, self.dependent = torch.device("cpu"), dtype, "host", False
        self._directory, self.scratch = directory, scratch
        self._device_index = -1
        self._tensors: list[torch.Tensor] = []

    def load(self, name: str, params: Any, block: int, *, defines: Sequence[str] = (), shared_bytes: int = 0) -> Any:
        return HostKernel(self, partial(self._build, name, (*defines, *dtype_defines(self.dtype))), params, block)

    def _build(self, name: str, macros: tuple[str, ...]) -> Path:
        binary = self._directory / "-".join((name, *macros)).replace("=", "_")
        if not binary.exists():
            command = [str(COMPILER), *FLAGS, f"-I{SOURCES}", f"-I{HERE}", *(f"-D{macro}" for macro in macros)]
            command += [f'-DKERNEL_FILE="{sources()[name]}"', f"-DKERNEL_NAME={name}", str(HERE / "host_runner.cpp")]
            unfinished = self.scratch / binary.name
            subprocess.run([*command, "-o", str(unfinished)], check=True, timeout=120)
            unfinished.replace(binary)
        return binary

    def track(self, *tensors: torch.Tensor) -> None:
        """Make tensors known whose addresses reach kernels without `check`."""
        self._tensors += tensors

    def check(self, name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> int:
        if not any(tensor is known for known in self._tensors):
            self._tensors.append(tensor)
        return super().check(name, tensor, dtype, *shape)

    def owner_of(self, address: int) -> torch.Tensor:
        """Return the tensor an address points into."""
        for tensor in reversed(self._tensors):
            if tensor.data_ptr() <= address < tensor.data_ptr() + max(tensor.nbytes, 1):
                return tensor
        raise AssertionError(f"{address:#x} points into no tensor the launcher checked")
