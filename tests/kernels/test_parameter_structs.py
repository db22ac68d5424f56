"""The structs that kernels take by value are as large in params.py as the kernels were compiled to read."""

from __future__ import annotations

import ctypes
import inspect
import re

import pytest
from kernels.test_compile import BUILDS
from loraplex_kernels import flora_params, fp8_params, params, row_params
from loraplex_kernels.compiler import SOURCES, Build, CubinCache, sources

MIRRORS = {
    name: cls
    for module in (params, flora_params, fp8_params, row_params)
    for _, cls in inspect.getmembers(module, inspect.isclass)
    if issubclass(cls, ctypes.Structure) and cls.__module__ == module.__name__
    for name in re.findall(r"csrc/([\w/]+\.cuh?)\b", inspect.getdoc(cls) or "")
}
"""File below `SOURCES` -> mirror of the struct that it defines, or that a header defines for it."""
NAMES = {path.relative_to(SOURCES).as_posix(): name for name, path in sources().items()}
KERNELS = sorted(NAMES)


def source_of(name: str) -> str:
    """Return a file with all that it includes."""
    text = (SOURCES / name).read_text()
    return text + "".join(source_of(header) for header in re.findall(r'#include "([\w/]+\.cuh)"', text))


def build_of(name: str) -> Build:
    defines = next(defines for kernel, defines, _ in BUILDS if kernel == NAMES[name])
    return Build(name=NAMES[name], defines=defines)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_asserts_the_size_of_its_struct_and_names_its_mirror(name: str) -> None:
    asserted = re.findall(r'static_assert\(sizeof\(Params\) == (\d+), "\w*params.py mirrors it"\)', source_of(name))

    assert asserted == [str(ctypes.sizeof(MIRRORS[name]))]


@pytest.mark.parametrize("name", sorted(MIRRORS.keys() - set(KERNELS)))
def test_a_header_asserts_the_size_of_its_struct(name: str) -> None:
    mirror = MIRRORS[name]

    expected = f'static_assert(sizeof({mirror.__name__}) == {ctypes.sizeof(mirror)}, "params.py mirrors it");'

    assert expected in (SOURCES / name).read_text()


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_compiled_to_take_as_many_bytes_as_its_mirror_has(cubins: CubinCache, name: str) -> None:
    build = build_of(name)

    ptx = cubins.get(Build(name=build.name, defines=(*build.defines, "LORAPLEX_PDL")), "compute_90a").image.decode()

    sizes = re.findall(rf"\.param [^,)]*\b{build.name}_param_\d+\[(\d+)\]", ptx)
    assert sizes == [str(ctypes.sizeof(MIRRORS[name]))]


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_a_loaded_kernel_takes_as_many_bytes_as_its_mirror_has(cubins: CubinCache, name: str) -> None:
    import torch
    from cuda.bindings import driver
    from loraplex_kernels.module import device_arch

    torch.zeros(1, device="cuda")  # makes a context
    build = build_of(name)
    image = cubins.get(build, device_arch(torch.device("cuda", 0))).image
    _, module = driver.cuModuleLoadData(image)
    _, function = driver.cuModuleGetFunction(module, build.name.encode())

    result, _, size = driver.cuFuncGetParamInfo(function, 0)

    assert result == driver.CUresult.CUDA_SUCCESS
    assert size == ctypes.sizeof(MIRRORS[name])
    assert driver.cuFuncGetParamInfo(function, 1)[0] == driver.CUresult.CUDA_ERROR_INVALID_VALUE, "one struct, no more"
