"""Every kernel as sm_80 code, and the small ones against their fp32 references: random inputs, poisoned outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.device_cases import run_all
from kernels.gpu_tensors import DTYPES, TOLERANCE, ints, libraries, poisoned, randn
from kernels.kernel_cases import relative_error
from loraplex_kernels import reference
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.rope_kv import RopeKv
from loraplex_kernels.compiler import sources
from loraplex_kernels.module import KernelLibrary
from loraplex_kernels.pointwise.embedding import Embedding
from loraplex_kernels.pointwise.rms_norm import RmsNorm
from loraplex_kernels.pointwise.silu_mul import SiluMul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def test_every_kernel_computes_as_sm_80_code() -> None:
    loaded: set[str] = set()

    class RecordingLibrary(KernelLibrary):
        def load(self, name: str, *arguments: Any, **fields: Any) -> Any:
            loaded.add(name)
            return super().load(name, *arguments, **fields)

    failures = run_all(lambda dtype: RecordingLibrary(torch.device("cuda", 0), dtype, arch="compute_80"))

    assert not failures
    assert loaded == sources().keys() - {"fp8_product"}  # which exists as sm_90a code alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 576, 2048, 4096, 5120, 8192])
def test_rms_norm(dtype: torch.dtype, hidden: int) -> None:
    for lib in libraries(dtype):
        x, residual, weight = randn(33, hidden, dtype=dtype), randn(33, hidden, dtype=dtype), randn(hidden, dtype=dtype)
        out, expected = poisoned(33, hidden, dtype=dtype), reference.rms_norm(x, weight, 1e-5, residual)
        total = x + residual

        RmsNorm(lib, hidden, 1e-5).launch(x, weight, out, residual=residual)

        assert relative_error(out, expected) < TOLERANCE[dtype]
        assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1536, 11008, 14336])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    for lib in libraries(dtype):
        gate_up, out = randn(70, 2 * width, dtype=dtype), poisoned(70, width, dtype=dtype)

        SiluMul(lib, width).launch(gate_up, out)

        assert relative_error(out, reference.silu_mul(gate_up)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [576, 8192])
def test_embedding(dtype: torch.dtype, hidden: int) -> None:
    table = randn(100, hidden, dtype=dtype)
    for lib in libraries(dtype):
        out = poisoned(4, hidden, dtype=dtype)

        Embedding(lib, hidden).launch(table, ints([3, -1, 99, 100]), ints([0, 2, 1, 0]), ints([7, 8, 6]), out)

        assert torch.equal(out[:3], table[[3, 6, 99]])
        assert not out[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "has_norm"),
    [(9, 3, 64, False), (16, 16, 64, True), (32, 8, 128, True), (32, 32, 128, False)],
)
def test_rope_kv(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, has_norm: bool) -> None:
    layers, block, tokens = 2, 16, 37
    page_bytes = layers * 2 * kv_heads * block * head_dim * dtype.itemsize
    layout = KvLayout(
        page_bytes=page_bytes, block_tokens=block, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
    )
    for lib in libraries(dtype):
        pool = torch.zeros(5, page_bytes, dtype=torch.uint8, device="cuda")
        rotary = reference.rotary_table(512, head_dim).cuda()
        qkv = randn(tokens, layout.qkv_width, dtype=dtype)
        before = qkv.clone().view(tokens, -1, head_dim)
        slots = torch.randperm(5 * block, device="cuda")[:tokens].int()
        positions = torch.randint(0, 512, (tokens,), device="cuda").int()
        norms = [randn(head_dim, dtype=dtype) for _ in range(2)] if has_norm else [None, None]

        RopeKv(lib, layout, pool, rotary).launch(1, qkv, positions, slots, q_norm=norms[0], k_norm=norms[1])

        q, key, value = torch.split(before, [heads, kv_heads, kv_heads], dim=1)
        if norms[0] is not None and norms[1] is not None:
            q, key = reference.rms_norm(q, norms[0], 1e-6), reference.rms_norm(key, norms[1], 1e-6)
        got_key, got_value = reference.read_kv(pool, layout, dtype, 1, torch.arange(5, device="cuda"), 5 * block)
        got_q = qkv.view(tokens, -1, head_dim)[:, :heads]
        assert relative_error(got_q, reference.rope(q, rotary, positions)) < TOLERANCE[dtype]
        assert relative_error(got_key[slots.long()], reference.rope(key, rotary, positions)) < TOLERANCE[dtype]
        assert torch.equal(got_value[slots.long()], value)
