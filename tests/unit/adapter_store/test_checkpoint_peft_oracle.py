"""The checkpoint reader agrees with PEFT on ranks, scalings and targeted modules, for any configuration."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex_adapter_store.checkpoint.canonical import canonicalise, read_canonical
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.adapter_image import LOW_RANK, AdapterSpec
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterIncompatibleError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from support.adapters import module_name
from support.decoder_shapes import PROJECTIONS
from support.store_rig import tiny_base_dir
from transformers import AutoConfig, AutoModelForCausalLM

MODULES = st.sampled_from(PROJECTIONS)
PATTERNS = st.sampled_from(
    [*PROJECTIONS, r"layers\.1\..*_proj", "model.layers.0.self_attn.q_proj", ".*mlp.*", "[qk]_proj"]
)
TARGETS = st.one_of(
    st.lists(MODULES, min_size=1, unique=True),
    st.sampled_from(
        ["all-linear", r".*\.(q|v)_proj", r"model\.layers\.1\..*(up|down)_proj", "model.layers.0.mlp.gate_proj"]
    ),
)
CONFIGS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 12),
        "lora_alpha": st.integers(1, 40),
        "use_rslora": st.booleans(),
        "target_modules": TARGETS,
        "exclude_modules": st.none() | st.lists(MODULES, max_size=2) | st.just(r".*layers\.0\..*k_proj"),
        "layers_to_transform": st.none() | st.lists(st.integers(0, 1), min_size=1, unique=True) | st.integers(0, 1),
        "layers_pattern": st.sampled_from([None, "layers", ["layers"]]),
        "rank_pattern": st.dictionaries(PATTERNS, st.integers(1, 12), max_size=2),
        "alpha_pattern": st.dictionaries(PATTERNS, st.integers(1, 40), max_size=2),
    }
)


def make_base_model() -> Any:
    torch.set_num_threads(1)
    factory: Any = AutoModelForCausalLM  # untyped
    return factory.from_config(AutoConfig.from_pretrained(tiny_base_dir()))


def make_peft_model(fields: dict[str, Any]) -> Any:
    return get_peft_model(make_base_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields))


def reloaded(folder: str) -> Any:
    """Return the model that PEFT makes of a saved checkpoint, or None if it cannot load it.

    The oracle is loading, not training: PEFT saves patterns sorted, so where several match, another may win afterwards.
    """
    try:
        return PeftModel.from_pretrained(make_base_model(), folder)
    except RuntimeError:
        return None


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fields=CONFIGS, dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_ranks_scalings_and_weights_are_those_of_peft(fields: dict[str, Any], dtype: torch.dtype) -> None:
    if isinstance(fields["target_modules"], str) or fields["layers_to_transform"] is None:
        fields = fields | {"layers_to_transform": None, "layers_pattern": None}
    try:
        model = make_peft_model(fields)
    except ValueError:
        return  # PEFT itself finds nothing to adapt
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = Path(folder, "adapter_config.json").read_bytes()
        weights = Path(folder, "adapter_model.safetensors").read_bytes()
        model = reloaded(folder)
    if model is None:
        with pytest.raises(AdapterIncompatibleError, match="shape"):
            read_checkpoint(config, weights, load_base_model(tiny_base_dir()))
        return

    form = canonicalise(read_checkpoint(config, weights, load_base_model(tiny_base_dir())))

    expected = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and module.r
    }
    adapter = read_canonical(b"".join(form.chunks()), form.revision)
    assert {module_name(m.layer, m.projection) for m in adapter.spec.modules} == set(expected)
    for module in adapter.spec.modules:
        layer: Any = expected[module_name(module.layer, module.projection)]
        assert module.rank == layer.r["default"]
        assert module.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        a, b = adapter.tensors[module.layer, module.projection, LOW_RANK]
        assert torch.equal(torch.from_numpy(a.copy()), layer.lora_A["default"].weight.detach().float())
        assert torch.equal(torch.from_numpy(b.copy()), layer.lora_B["default"].weight.detach().float())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"modules_to_save": ["norm"]}, "modules_to_save names 'norm'"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 10**6]}, "alora_invocation_tokens: 1000000 is not below the 384 tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_what_peft_can_do_and_we_cannot_is_refused_by_name(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = make_base_model()
    base: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2}
    get_peft_model(model, LoraConfig(**base | fields)).save_pretrained(str(tmp_path))

    with pytest.raises(AdapterIncompatibleError, match=named):
        read_checkpoint(
            (tmp_path / "adapter_config.json").read_bytes(),
            (tmp_path / "adapter_model.safetensors").read_bytes(),
            load_base_model(tiny_base_dir()),
        )


def test_the_sequence_of_an_activated_adapter_is_part_of_its_revision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2}
    model = get_peft_model(make_base_model(), LoraConfig(**settings, alora_invocation_tokens=[5, 6]))
    model.save_pretrained(str(tmp_path))
    config, weights = (tmp_path / "adapter_config.json"), (tmp_path / "adapter_model.safetensors").read_bytes()

    def form() -> Any:
        return canonicalise(read_checkpoint(config.read_bytes(), weights, load_base_model(tiny_base_dir())))

    activated = form()
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"alora_invocation_tokens": None}))
    plain = form()
    read_back = read_canonical(b"".join(activated.chunks()), activated.revision)

    assert activated.text_parts.invocation_token_ids == (5, 6)
    assert activated.spec.is_activated
    assert read_back.spec == activated.spec == AdapterSpec.from_json(activated.spec.to_json())
    assert activated.revision != plain.revision
    assert not plain.spec.is_activated
    assert plain.text_parts.info is None
    assert b'"parts":{"activation":{}}' in activated.spec.to_json(), (
        "engines that do not know such adapters refuse them"
    )
