"""FLoRA of rank 1 is read as factors wherever the projections of one input agree on it, and computes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loraplex_adapter_store.checkpoint.canonical import canonicalise, read_canonical
from loraplex_common.flora import FLORA
from loraplex_common.vectors import IN_VECTOR, OUT_VECTOR
from support.method_files import method_tensors, read_method
from support.peft_methods import base_info, outputs_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_adapter_store.checkpoint.reader import Checkpoint
    from loraplex_common.base_model import BaseModelInfo

ALL_OF_QKV = ["q_proj", "k_proj", "v_proj", "down_proj"]
FACTORS = [OUT_VECTOR, IN_VECTOR]


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return base_info("qwen2")


def read_rank_one(
    base: BaseModelInfo, change: Callable[[dict[str, Any]], Any] | None = None, **config: Any
) -> Checkpoint:
    def cut(tensors: dict[str, Any]) -> None:
        for name, values in tensors.items():
            tensors[name] = np.ascontiguousarray(values[:1] if "lora_A" in name else values[:, :1])
        if change is not None:
            change(tensors)

    return read_method(base, "flora", change=cut, r=1, **config)


def kinds(checkpoint: Checkpoint) -> dict[tuple[int, str], list[str]]:
    return {(each.layer, each.projection): [part.kind for part in each.parts] for each in checkpoint.modules}


def add_k(tensors: dict[str, Any]) -> None:
    """Add k as v is."""
    for name in list(tensors):
        if "v_proj" in name:
            tensors[name.replace("v_proj", "k_proj")] = tensors[name]


def share_a(tensors: dict[str, Any]) -> None:
    add_k(tensors)
    for name in tensors:
        if "self_attn" in name and name.endswith("lora_A.weight"):
            tensors[name] = tensors[f"{name.partition('.self_attn')[0]}.self_attn.q_proj.lora_A.weight"]


def test_a_projection_with_an_input_of_its_own_becomes_factors_and_others_stay(base: BaseModelInfo) -> None:
    checkpoint = read_rank_one(base)

    assert kinds(checkpoint) == {
        (layer, name): FACTORS if name == "down_proj" else [FLORA]
        for layer in range(base.num_layers)
        for name in ("q_proj", "v_proj", "down_proj")
    }
    said = f"lora_A and lora_B of rank 1 are factors on inputs and outputs: {base.num_layers} modules"
    assert checkpoint.folded == (said,)


@pytest.mark.parametrize(("change", "expected"), [(add_k, [FLORA]), (share_a, FACTORS)], ids=["apart", "shared"])
def test_projections_of_one_input_become_factors_only_if_all_of_them_share_it(
    base: BaseModelInfo, change: Callable[[dict[str, Any]], Any], expected: list[str]
) -> None:
    found = kinds(read_rank_one(base, change, target_modules=ALL_OF_QKV))

    assert all(found[0, name] == expected for name in ("q_proj", "k_proj", "v_proj"))


def test_higher_ranks_stay_as_they_are(base: BaseModelInfo) -> None:
    checkpoint = read_method(base, "flora")

    assert {kind for each in kinds(checkpoint).values() for kind in each} == {FLORA}
    assert checkpoint.folded == ()


def test_the_factors_compute_what_the_file_says_and_leave_the_bases_bias_alone(base: BaseModelInfo) -> None:
    written: dict[str, Any] = {}

    def change(tensors: dict[str, Any]) -> None:
        share_a(tensors)
        written.update(tensors)

    form = canonicalise(read_rank_one(base, change, target_modules=ALL_OF_QKV))
    adapter = read_canonical(b"".join(form.chunks()), form.revision)
    (module,) = (each for each in adapter.spec.modules if (each.layer, each.projection) == (1, "k_proj"))
    parts = {part.kind: (part, adapter.tensors[1, "k_proj", part.kind]) for part in module.parts}
    a, b = (written[f"base_model.model.model.layers.1.self_attn.k_proj.lora_{each}.weight"] for each in "AB")
    layer, x = torch.nn.Linear(a.shape[1], b.shape[0]), np.random.default_rng(0).standard_normal((3, a.shape[1]))

    found = outputs_of(parts, layer, x)

    weight, bias = layer.weight.detach().numpy().astype(np.float64), layer.bias.detach().numpy()
    np.testing.assert_allclose(found, x @ (weight * (b.astype(np.float64) @ a)).T + bias, atol=1e-9)
    assert method_tensors(base, "flora").keys() < written.keys()
