"""Compiles CUDA C++ to machine code through NVRTC, with a cache of cubins on disk. Needs no GPU."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from cuda.bindings import nvrtc

SOURCES: Final = Path(__file__).parent / "csrc"
DEFAULT_CACHE: Final = Path.home() / ".cache" / "loraplex" / "cubins"
OPTIONS: Final = ("--std=c++17", "--ptxas-options=-v")
ENTRY_POINT: Final = re.compile(
    r'^extern "C" __global__[^{;]*?(\w+)\(const (?:__grid_constant__ )?Params p\)', re.MULTILINE
)


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """One kernel and the macros it is compiled with.

    Attributes:
        name: Name of the entry point, as profilers show it; `sources` has its file.
        defines: Macros as ``NAME`` or ``NAME=VALUE``.
    """

    name: str
    defines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A compiled kernel.

    Attributes:
        image: Cubin, or PTX if the architecture is ``compute_NN``.
        registers: Registers per thread; 0 for PTX, which is assembled later.
        spill_bytes: Spilled stores and loads per thread.
        shared_bytes: Static shared memory per block.
    """

    image: bytes
    registers: int
    spill_bytes: int
    shared_bytes: int


def _check(result: Any, program: Any = None, what: str = "") -> None:
    if result == nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return
    log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode() if program is not None else ""
    raise CompileError(f"{what}: {result.name}\n{log}".strip())


def _text(size_of: Any, get: Any, program: Any) -> bytes:
    result, size = size_of(program)
    _check(result)
    data = bytes(size)
    _check(get(program, data)[0])
    return data


@functools.cache
def nvrtc_version() -> str:
    """Return the version of the compiler that is loaded."""
    result, major, minor = nvrtc.nvrtcVersion()
    _check(result)
    return f"{major}.{minor}"


@functools.cache
def headers() -> dict[str, str]:
    """Return the headers of all kernels: path below `SOURCES`, as ``#include`` gives it -> text."""
    return {path.relative_to(SOURCES).as_posix(): path.read_text() for path in sorted(SOURCES.rglob("*.cuh"))}


@functools.cache
def sources() -> dict[str, Path]:
    """Return the file of every kernel: name of the entry point -> ``.cu`` file.

    Raises:
        CompileError: If a file does not declare exactly one entry point, or two files declare the same one.
    """
    found: dict[str, Path] = {}
    for path in sorted(SOURCES.rglob("*.cu")):
        names = ENTRY_POINT.findall(path.read_text())
        if len(names) != 1 or names[0] in found:
            raise CompileError(f"{path} declares the entry points {names}; expected one that no other file declares")
        found[names[0]] = path
    return found


def source_of(build: Build) -> Path:
    """Return the file of a kernel.

    Raises:
        CompileError: If there is no kernel of this name.
    """
    try:
        return sources()[build.name]
    except KeyError:
        raise CompileError(f"no kernel {build.name!r}; there are {', '.join(sorted(sources()))}") from None


def cache_key(build: Build, arch: str) -> str:
    """Return a digest of everything that the machine code depends on."""
    parts = [
        source_of(build).read_text(),
        *headers().items(),
        build.defines,
        arch,
        OPTIONS,
        nvrtc_version(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compile_kernel(build: Build, arch: str) -> Program:
    """Compile a kernel for ``sm_NN`` (cubin) or ``compute_NN`` (PTX).

    Raises:
        CompileError: If NVRTC refuses it; the message has NVRTC's log.
    """
    path = source_of(build)
    source, file = path.read_text(), path.relative_to(SOURCES).as_posix()
    names, texts = [name.encode() for name in headers()], [text.encode() for text in headers().values()]
    result, program = nvrtc.nvrtcCreateProgram(source.encode(), file.encode(), len(names), texts, names)
    _check(result, what=build.name)
    try:
        options = [f"--gpu-architecture={arch}", *OPTIONS, *(f"-D{define}" for define in build.defines)]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        _check(result, program, f"{file} for {arch} with {', '.join(build.defines) or 'no macros'}")
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode()
        if arch.startswith("compute_"):
            image = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
        else:
            image = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Program(
        image=image,
        registers=_largest(r"Used (\d+) registers", log),
        spill_bytes=_largest(r"(\d+) bytes spill stores", log) + _largest(r"(\d+) bytes spill loads", log),
        shared_bytes=_largest(r"(\d+) bytes smem", log),
    )


def _largest(pattern: str, log: str) -> int:
    return max(map(int, re.findall(pattern, log)), default=0)


class CubinCache:
    """Compiled kernels in a directory; processes may share it, since a file gets its name only when it is complete."""

    def __init__(self, directory: Path = DEFAULT_CACHE) -> None:
        self._directory = directory

    def get(self, build: Build, arch: str) -> Program:
        """Return the compiled kernel, compiling it unless an equal one is cached.

        Raises:
            CompileError: If NVRTC refuses it; the message has NVRTC's log.
        """
        path = self._directory / f"{build.name}-{arch}-{cache_key(build, arch)[:32]}"
        try:
            facts, image = path.read_bytes().split(b"\n", 1)
            return Program(image=image, **json.loads(facts))
        except FileNotFoundError:
            program = compile_kernel(build, arch)
            self._write(path, program)
            return program

    def _write(self, path: Path, program: Program) -> None:
        facts = asdict(program)
        image = facts.pop("image")
        self._directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:
            file.write(json.dumps(facts).encode() + b"\n" + image)
        os.replace(file.name, path)
