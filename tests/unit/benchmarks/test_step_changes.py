"""Changes of a step that the benchmark times: each is in force while it lasts, and gone afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import HostLibrary
from loraplex_bench.steps.step_changes import LEFT_OUT, OTHERWISE, QUANTISE_VECTORS, changed
from loraplex_engine.runners.cuda.decoder import LlamaDecoder
from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs
from loraplex_engine.runners.cuda.gate_products import GateProducts
from loraplex_engine.runners.cuda.lora_paths import BasePath
from loraplex_kernels.attention.rope_kv import RopeKv
from loraplex_kernels.pointwise.fp8 import QuantiseFp8, RmsNormFp8
from loraplex_kernels.products import fp8_cut
from loraplex_kernels.sampling.greedy import Greedy

if TYPE_CHECKING:
    from pathlib import Path

KERNELS: dict[str, Any] = {
    "norms": RmsNormFp8,
    "RoPE and KV": RopeKv,
    "quantising inputs of o and down": QuantiseFp8,
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


def test_downs_input_is_quantised_by_as_many_ctas_as_names_say(tmp_path: Path) -> None:
    library = HostLibrary(torch.bfloat16, tmp_path)

    def shares() -> int:
        return QuantiseFp8(library, 14336, has_groups=False, maxima=224)._shares

    own, found = shares(), []
    for vectors in QUANTISE_VECTORS:
        with OTHERWISE[f"down's input quantised by CTAs of {vectors} vectors"]():
            found.append(shares())

    assert found == [8, 2]
    assert shares() == own == 4


def test_a_gate_behind_the_product_is_in_no_product() -> None:
    launch = GateProducts.launch

    with OTHERWISE["gate behind gate_up's product"]():
        assert not GateProducts.launch(*[None] * 6)  # type: ignore[arg-type]

    assert GateProducts.launch is launch


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
    with pytest.raises(AttributeError), changed(QuantiseFp8, no_such_name=1):
        pass
