"""The kernels of the embedding and of lm_head of adapters on the GPU, against plain torch on the host."""

from __future__ import annotations

import pytest
import torch
from kernels.gpu_tensors import DTYPES, libraries
from kernels.kernel_cases import relative_error
from kernels.outside_device_cases import OutsideRig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_and_logits_are_those_of_each_rows_adapter(dtype: torch.dtype) -> None:
    for library in libraries(dtype):
        for num_sms in (1, 132):
            rig = OutsideRig(library, num_sms=num_sms)
            embedded, expected, _ = rig.embed()
            assert relative_error(embedded, expected) < TOLERANCE[dtype]
            found, expected, before = rig.logits()
            finite = torch.isfinite(expected)
            assert torch.equal(torch.isfinite(found.float()), finite)
            assert relative_error(found[finite], expected[finite]) < TOLERANCE[dtype]
            assert torch.equal(found[rig.row_adapters < 0], before[rig.row_adapters < 0])
