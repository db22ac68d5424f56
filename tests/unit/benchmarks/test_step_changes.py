"""Changes of a step that the benchmark times: each is in force while it lasts, and gone afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import HostLibrary
from loraplex_bench.steps.step_changes import GATE_CUTS, LEFT_OUT, OTHERWISE, changed
from loraplex_engine.runners.cuda.decoder import LlamaDecoder
from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs
from loraplex_engine.runners.cuda.lora_paths import BasePath
from loraplex_kernels.attention.rope_kv import RopeKv
from loraplex_kernels.pointwise.fp8 import GateCut, QuantiseFp8, RmsNormFp8, SiluMulFp8
from loraplex_kernels.products import fp8_cut
from loraplex_kernels.sampling.greedy import Greedy

if TYPE_CHECKING:
    from pathlib import Path

KERNELS: dict[str, Any] = {
    "norms": RmsNormFp8,
    "gate": SiluMulFp8,
    "RoPE and KV": RopeKv,
    "quantising attention's output": QuantiseFp8,
    "greedy rows": Greedy,
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_kernel_that_is_left_out_launches_nothing_and_then_does_again(name: str) -> None:
    kernel = KERNELS[name]
    launch = kernel.launch
    unready = kernel.__new__(kernel)  # has no kernel to launch

    with LEFT_OUT[name]():
        unready.launch(None, None, rows=None)

    assert kernel.launch is launch
    with pytest.raises((AttributeError, TypeError)):
        unready.launch(None, None, rows=None)


def test_gates_are_cut_as_their_names_say(tmp_path: Path) -> None:
    library = HostLibrary(torch.bfloat16, tmp_path)
    own = GateCut.of(library, 14336, has_groups=False)
    found = []

    for shares, threads in GATE_CUTS:
        with OTHERWISE[f"gate on {shares} CTAs of at most {threads}"]():
            cut = GateCut.of(library, 14336, has_groups=False)
        found.append((cut.shares, cut.block))

    assert found == [(1, 896), (4, 448), (4, 128), (2, 224)]
    assert GateCut.of(library, 14336, has_groups=False) == own == GateCut(shares=2, block=448, vectors=2)


def test_only_wide_products_are_cut_otherwise() -> None:
    wide, narrow = (fp8_cut.choose_cuts(outputs, 132) for outputs in (28672, 4096))

    with OTHERWISE["gate_up of four warpgroups a CTA"]():
        assert {(each.warpgroups, each.ctas) for each in fp8_cut.choose_cuts(28672, 132)} == {(4, 1)}
        assert fp8_cut.choose_cuts(4096, 132) == narrow

    assert fp8_cut.choose_cuts(28672, 132) == wide


def test_inputs_have_memory_while_bf16_is_written_too() -> None:
    decoder, path = object.__new__(LlamaDecoder), object.__new__(BasePath)
    decoder._code_ops, decoder._inputs = frozenset({"qkv"}), object.__new__(Fp8Inputs)
    buffer = torch.zeros(2)

    with OTHERWISE["bf16 of norm and gate, too"]():
        assert decoder._input(path, "qkv", buffer) is buffer

    assert decoder._input(path, "qkv", buffer).is_meta


def test_what_is_not_there_is_not_changed() -> None:
    with pytest.raises(AttributeError), changed(GateCut, no_such_name=1):
        pass
