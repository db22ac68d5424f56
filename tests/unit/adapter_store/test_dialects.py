"""An adapter that another program has written is the same adapter: its revision is that of PEFT's own file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pytest
import torch
from loraplex_adapter_store.checkpoint.canonical import canonicalise
from loraplex_adapter_store.checkpoint.dialects import RULES, normalise
from loraplex_adapter_store.checkpoint.dialects.table import markdown
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_adapter_store.checkpoint.safetensors_file import read_tensors
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from peft import LoraConfig, get_peft_model
from support.decoder_shapes import PROJECTIONS
from support.dialects import WRITERS, mlx, torchtune
from support.safetensors_files import safetensors_bytes
from support.store_rig import tiny_base_dir
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.dialects import Fields, Values

Q = "base_model.model.model.layers.0.self_attn.q_proj"
NAME = f"{Q}.lora_A.weight"


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


def saved(folder: Path, **settings: Any) -> tuple[Fields, Values]:
    """Return what PEFT saves of a random adapter: its configuration, and its tensors in fp32."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM  # untyped
    model: Any = factory.from_config(AutoConfig.from_pretrained(tiny_base_dir()))
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": list(PROJECTIONS)}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **defaults | settings))
    model.save_pretrained(folder)
    fields = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "tiny"}
    tensors = read_tensors((folder / "adapter_model.safetensors").read_bytes(), file="adapter_model.safetensors")
    return fields, {name: tensor.values() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fields, Values]:
    """PEFT's adapter on all projections; what Megatron fuses shares its A."""
    fields, values = saved(tmp_path_factory.mktemp("adapter"))
    for name in values:
        shared = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        if "lora_A" in name:
            values[name] = values[shared]
    return fields, values


def revision(fields: Fields, values: Values, base: BaseModelInfo, dtype: str = "float32") -> str:
    data = json.dumps(fields).encode(), safetensors_bytes(values, dtype)
    return canonicalise(read_checkpoint(*data, base)).revision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WRITERS)
def test_an_adapter_of_another_program_has_the_revision_of_pefts_file(
    base: BaseModelInfo, adapter: tuple[Fields, Values], name: str, dtype: str
) -> None:
    write, rules = WRITERS[name]
    fields, values = write(*adapter, base)

    checkpoint = read_checkpoint(json.dumps(fields).encode(), safetensors_bytes(values, dtype), base)

    assert canonicalise(checkpoint).revision == revision(*adapter, base, dtype)
    read = {
        rule for rule in RULES if any(RULES[rule].meaning.replace("`", "'") in note for note in checkpoint.warnings)
    }
    alike = {rule for rule in RULES for other in rules if RULES[rule].meaning == RULES[other].meaning}
    assert rules <= read <= alike
    assert all(RULES[rule].program in " ".join(checkpoint.warnings) for rule in rules)


def test_every_rule_is_tested_against_pefts_own_file() -> None:
    tested = set().union(*(rules for _, rules in WRITERS.values()))

    assert RULES.keys() - tested == {"target_parameters", "mlx_dora"}, "these have tests of their own"


def test_the_last_layers_of_mlx_are_the_last_ones(base: BaseModelInfo, tmp_path: Path) -> None:
    peft = saved(tmp_path, layers_to_transform=[1], target_modules=["q_proj", "up_proj"])
    fields, values = mlx(*peft, base)
    assert fields["num_layers"] == 1

    assert revision(fields, values, base) == revision(*peft, base)
    keys = fields["lora_parameters"] | {"keys": ["self_attn.q_proj", "mlp.up_proj"]}
    assert revision(fields | {"lora_parameters": keys}, values, base) == revision(*peft, base)
    first = {name.replace("layers.1.", "layers.0."): value for name, value in values.items()}
    with pytest.raises(AdapterIncompatibleError, match=r"layers\.0\..* is not explained"):
        revision(fields, first, base)


def test_magnitudes_of_mlx_and_torchtune_become_those_of_dora(base: BaseModelInfo) -> None:
    magnitudes = np.arange(64, dtype=np.float32)
    data = safetensors_bytes({"model.layers.0.self_attn.q_proj.m": magnitudes}, "float32")
    config = {"fine_tune_type": "dora", "num_layers": -1, "lora_parameters": {"rank": 4, "scale": 2.0}}

    found = normalise(json.dumps(config).encode(), read_tensors(data, file="adapters.safetensors"), base)

    assert json.loads(found.config)["use_dora"] is True
    assert found.tensors[f"{Q}.lora_magnitude_vector"].values().tolist() == magnitudes.tolist()
    data = safetensors_bytes({"layers.0.attn.q_proj.magnitude": magnitudes}, "float32")
    found = normalise(b'{"peft_type": "LORA"}', read_tensors(data, file="x"), base)
    assert found.tensors[f"{Q}.lora_magnitude_vector"].values()[:4].tolist() == [0, 2, 4, 6], (
        "a head's first halves first"
    )


def test_torchtune_leaves_rows_of_qwen_in_place(base: BaseModelInfo, adapter: tuple[Fields, Values]) -> None:
    qwen = replace(base, config=base.config | {"architectures": ["Qwen2ForCausalLM"]})
    other = replace(base, config=base.config | {"architectures": ["PhiForCausalLM"]})
    written = torchtune(*adapter, base, rotates=False)

    assert revision(*written, qwen) == revision(*adapter, base)
    assert revision(*written, base) != revision(*adapter, base)
    with pytest.raises(AdapterIncompatibleError, match="order of its rows in torchtune is not known"):
        revision(*written, other)


def test_a_parameter_that_is_a_projections_weight_is_the_projection(base: BaseModelInfo, tmp_path: Path) -> None:
    fields, values = saved(
        tmp_path, target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight"], layers_to_transform=[1]
    )
    named = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)] + ["model.layers.1.self_attn.q_proj"]
    plain = {name: value for name, value in fields.items() if name not in ("target_parameters", "layers_to_transform")}

    assert fields["target_parameters"] == ["mlp.down_proj.weight"]
    assert revision(fields, values, base) == revision(plain | {"target_modules": named}, values, base)
    regex = fields | {"target_modules": r"model\.layers\.1\..*\.q_proj", "layers_to_transform": None}
    assert revision(regex, values, base) == revision(fields, values, base)


Change: TypeAlias = "Callable[[Fields, Values], None]"


def setting(**changes: Any) -> Change:
    return lambda fields, _: fields.update(changes)


def written_by_mlx(**config: Any) -> Change:
    def change(fields: Fields, _: Values) -> None:
        fields.clear()
        fields.update(config)

    return change


def renaming(*names: tuple[str, str]) -> Change:
    def change(_: Fields, values: Values) -> None:
        for name, other in names:
            values[other] = values.pop(name)

    return change


def alpha(*values: float) -> Change:
    return lambda _, tensors: tensors.update({f"{Q}.alpha": np.array(values, dtype=np.float32)})


def without(name: str) -> Change:
    def change(fields: Fields, values: Values) -> None:
        fields.pop(name, None)
        values.pop(name, None)

    return change


REFUSED: dict[str, tuple[tuple[Change, ...], str]] = {
    "a tensor twice": ((lambda _, v: v.update({f"module.{NAME}": v[NAME]}),), f"appears twice, as {NAME} and as module"),
    "two adapters": (
        (renaming((NAME, f"{Q}.lora_A.a.weight"), (f"{Q}.lora_B.weight", f"{Q}.lora_B.b.weight")),),
        "several adapters: tensor .* is of '[ab]'",
    ),
    "another prefix": ((renaming((NAME, f"x.{NAME}")),), f"x.{Q}.* it loads {NAME}"),
    "an expert": ((lambda _, v: v.update({"model.layers.0.mlp.experts.0.up_proj.lora_a": v[NAME]}),), "experts"),
    "an alpha of its own": ((alpha(3),), "alpha is 3, .* lora_alpha = 6"),
    "an alpha beside a pattern": ((setting(alpha_pattern={"k_proj": 6}), alpha(6)), "and an alpha_pattern"),
    "alphas that are no numbers": ((alpha(6, 6),), "is no number"),
    "an alpha of no module": ((alpha(6), without(NAME)), "no matrices"),
    "no alpha at all": ((without("lora_alpha"), renaming((NAME, f"{Q}.lora_down.weight"))), "says its alpha"),
    "a parameter that is none of a projection": ((setting(target_parameters=["embed_tokens.weight"]),), "no projection's weight"),
    "a parameter of experts": ((setting(target_parameters=["mlp.experts.gate_up_proj"]),), "experts of a mixture"),
    "a parameter's rank": (
        (setting(target_parameters=["mlp.down_proj.weight"], rank_pattern={"down_proj": 4}),),
        "rank_pattern beside target_parameters",
    ),
    "parameters of one module": (
        (setting(target_parameters=["q_proj.weight"]), lambda _, v: v.update({f"{Q}.base_layer.lora_A.weight": v[NAME]})),
        "several parameters of its module",
    ),
    "parameters in another type": ((setting(target_parameters="q_proj.weight"),), "no list of names"),
    "fully trained with MLX": ((written_by_mlx(fine_tune_type="full"),), "fine_tune_type = 'full'"),
    "MLX with an alpha": (
        (written_by_mlx(lora_parameters={"rank": 4, "alpha": 8, "scale": 2.0}),),
        "'alpha', which versions of MLX-LM read differently",
    ),
    "MLX without a scale": ((written_by_mlx(lora_parameters={"rank": 4}),), "scale of lora_parameters"),
    "torchtune's names in a pattern": (
        (setting(alpha_pattern={"w1": 8}), lambda _, v: v.update({"layers.0.mlp.w1.lora_a.weight": v[NAME]})),
        "alpha_pattern names 'w1'",
    ),
    "a pattern on torchtune's attention": (
        (setting(alpha_pattern={"layers.0.attn.q_proj": 8}), renaming((NAME, "layers.0.attn.q_proj.lora_a.weight"))),
        "alpha_pattern names 'layers.0.attn.q_proj', which matches otherwise",
    ),
    "a pattern from the start of a model without its lm_head": (
        (setting(alpha_pattern={"^layers.0.self_attn.q_proj": 8}), renaming((NAME, NAME.replace(".model.model", ".model")))),
        "alpha_pattern names '.layers.0.self_attn.q_proj', which matches otherwise",
    ),
    "a pattern that PEFT does not match in a multimodal model": (
        (setting(alpha_pattern={"model.layers.0.self_attn.q_proj": 8}), renaming((NAME, NAME.replace(".lay", ".language_model.lay")))),
        "alpha_pattern names 'model.layers.0.self_attn.q_proj', which matches otherwise",
    ),
    "LoRA's dtype without MS-Swift": ((setting(lora_dtype="bf16"),), "unknown setting lora_dtype"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused_by_name(
    base: BaseModelInfo, adapter: tuple[Fields, Values], case: str
) -> None:
    changes, match = REFUSED[case]
    fields, values = dict(adapter[0]), dict(adapter[1])
    for change in changes:
        change(fields, values)

    with pytest.raises((AdapterIncompatibleError, AdapterCorruptUploadError), match=match):
        revision(fields, values, base)


def test_matrices_of_mlx_beside_pefts_configuration_are_told_apart_by_their_shapes(
    base: BaseModelInfo, adapter: tuple[Fields, Values], tmp_path: Path
) -> None:
    fields, values = adapter
    _, theirs = mlx(fields, values, base)
    turned = {name: value.T.copy() for name, value in theirs.items()}

    assert revision(fields, theirs, base) == revision(fields, turned, base) == revision(fields, values, base)
    square = saved(tmp_path, r=64, target_modules=["q_proj"])
    with pytest.raises(AdapterIncompatibleError, match=r"of shape \[64, 64\] may be transposed"):
        revision(square[0], mlx(*square, base)[1], base)
    assert revision(*mlx(*square, base), base) == revision(*square, base), "its own configuration decides"


@pytest.mark.parametrize("size", [None, 2])
def test_fused_rows_of_tensor_parallel_ranks_are_refused(
    base: BaseModelInfo, adapter: tuple[Fields, Values], size: int | None
) -> None:
    fields, values = WRITERS["Megatron"][0](*adapter, base)

    with pytest.raises(AdapterIncompatibleError, match=r"linear_fc1.*tensor_model_parallel_size = 1"):
        revision(fields | {"tensor_model_parallel_size": size}, values, base)


def test_fused_rows_of_another_width_are_refused(base: BaseModelInfo, adapter: tuple[Fields, Values]) -> None:
    fields, values = WRITERS["Megatron"][0](*adapter, base)
    name = "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight"
    values[name] = values[name][:-1]

    with pytest.raises(AdapterIncompatibleError, match=rf"{name} has shape \[127, 4\].* has 128 fused outputs"):
        revision(fields, values, base)


def test_tensors_are_views_unless_their_layout_is_another(base: BaseModelInfo, adapter: tuple[Fields, Values]) -> None:
    for name, num_copied in (
        ("PEFT", 0),
        ("FSDP", 0),
        ("kohya", 0),
        ("torchtune", 4),
        ("Megatron", 10),
        ("MLX-LM", 28),
    ):
        fields, values = WRITERS[name][0](*adapter, base)
        data = safetensors_bytes(values, "float32")
        tensors = read_tensors(data, file="x")
        found = normalise(json.dumps(fields).encode(), tensors, base)
        copied = [tensor for tensor in found.tensors.values() if tensor.data.obj is not data]
        assert len(copied) == num_copied, name


def test_the_page_of_adapters_has_the_table_of_rules() -> None:
    page = Path(__file__).parents[3] / "docs" / "adapters.md"

    assert markdown() in page.read_text(), "docs/adapters.md: print dialects.table.markdown() there"
