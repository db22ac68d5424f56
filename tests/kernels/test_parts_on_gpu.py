"""The kernels of factors, biases, FLoRA and sparse deltas on the GPU, against plain torch on the host."""

from __future__ import annotations

import pytest
import torch
from kernels.gpu_tensors import DTYPES, libraries
from kernels.kernel_cases import relative_error
from kernels.part_device_cases import ADAPTERS, PartRig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inter", "density"), [(512, 0.3), (4168, 0.01), (11008, 0.01), (28672, 0.002)])
def test_ops_with_every_part_equal_the_formula(dtype: torch.dtype, inter: int, density: float) -> None:
    for lib in libraries(dtype):
        for num_sms in (1, 132):
            rig, generator = (
                PartRig(lib, inter=inter, num_sms=num_sms, density=density),
                torch.Generator().manual_seed(inter),
            )
            for op in ("qkv", "gate_up", "down"):
                found, expected = rig.run(op, generator)
                assert relative_error(found.cpu(), expected) < TOLERANCE[dtype], f"{lib.arch} {lib.dependent} {op}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_result_is_the_same_bits_in_any_batch_and_any_cut(dtype: torch.dtype) -> None:
    for lib in libraries(dtype):
        found = []
        for adapters, num_sms in (
            (ADAPTERS, 132),
            (ADAPTERS, 3),
            ((-1, -1, *ADAPTERS[2:3], *(-1 for _ in ADAPTERS[3:])), 132),
        ):
            rig = PartRig(lib, adapters=adapters, num_sms=num_sms)
            found.append(rig.run("down", torch.Generator().manual_seed(1))[0][2])
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
