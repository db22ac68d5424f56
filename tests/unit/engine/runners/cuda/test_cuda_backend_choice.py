"""Which backend computes: our kernels where there is a GPU, torch elsewhere, and a clear refusal where neither can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_engine.build import max_rank, resolve_backend
from loraplex_engine.config import BackendName, ConfigError, DeviceName, EngineConfig
from support.decoder_shapes import decoder_geometry


def make_config(backend: BackendName = "auto", device: DeviceName = "auto") -> EngineConfig:
    return EngineConfig(model=Path("model"), backend=backend, device=device)


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [("auto", "cpu", "torch"), ("auto", "cuda", "cuda"), ("torch", "cuda", "torch"), ("cuda", "cuda", "cuda")],
)
def test_the_backend_follows_the_device_unless_it_is_named(
    backend: BackendName, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())

    assert resolve_backend(make_config(backend), torch.device(device)) == expected
    assert max_rank(make_config(backend), torch.device(device)) == {"torch": 0, "cuda": 512}[expected]


def test_our_kernels_without_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="sees no GPU"):
        resolve_backend(make_config("cuda"), torch.device("cpu"))


def test_a_gpu_without_cuda_python_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    with pytest.raises(ConfigError, match="--backend torch"):
        resolve_backend(make_config(), torch.device("cuda"))


def test_a_rank_our_kernels_cannot_take_names_module_and_remedy() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    from loraplex_engine.runners.cuda.runner import CudaRunner
    from loraplex_engine.runners.token_rows import TokenRows

    runner = object.__new__(CudaRunner)  # the check needs no device
    runner.geometry = decoder_geometry(
        dtype="bfloat16",
        page_bytes=1 << 20,
        num_layers=4,
        hidden_size=512,
        intermediate_size=1024,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
    )
    runner._rows = TokenRows(runner.geometry, vocab_size=512, max_added_tokens=0)
    modules = tuple(
        ModuleSpec.low_rank(3, name, rank, 1.0) for name, rank in (("q_proj", 512), ("k_proj", 512), ("v_proj", 513))
    )

    runner.check_adapter(AdapterSpec("a" * 64, modules[:2]))
    with pytest.raises(AdapterIncompatibleError, match=r"layer 3: rank 513 \(v_proj\) .*--backend torch"):
        runner.check_adapter(AdapterSpec("a" * 64, modules))


def test_contradicting_flags_are_refused() -> None:
    with pytest.raises(ConfigError, match="--backend cuda needs --device"):
        make_config("cuda", "cpu")
