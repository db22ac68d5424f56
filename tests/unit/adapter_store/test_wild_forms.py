"""Adapters as trainers leave them, one row each: the adapter that PEFT would have written, or refused by name."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.canonical import canonicalise
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_adapter_store.checkpoint.safetensors_file import read_tensors
from loraplex_adapter_store.checkpoint.tokenizer_files import check_tokenizer_files
from loraplex_common.adapter_folder import TEXT_FILES
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from peft import AdaLoraConfig, IA3Config, LoraConfig, ShiraConfig, VeraConfig
from support.adapters import Recipe, adapter_config, adapter_tensors
from support.base_models import CHAT_TEMPLATE
from support.decoder_shapes import PROJECTIONS
from support.dialects import WRITERS, mlx, torchtune
from support.peft_methods import base_dir, base_info, save_trained
from support.safetensors_files import assemble, safetensors_bytes
from support.store_rig import tiny_base_dir
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.dialects import Fields, Values

BASE = "llama"
LAYERS = "base_model.model.model.layers."
RECIPE = Recipe(rank=4, alpha=8)
SAME = "the adapter of PEFT's file"
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer).*?(?:k_proj|v_proj|o_proj|"
    r"gate_proj|up_proj|down_proj|q_proj))|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|"
    r"dense|mixer)\.(?:(?:k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|q_proj)))"
)
Form: TypeAlias = "Callable[[Fields, Values], tuple[Fields, Values]]"


def as_written_by(program: str) -> Form:
    return lambda fields, values: WRITERS[program][0](fields, values, base_info(BASE))


def with_settings(**settings: Any) -> Form:
    return lambda fields, values: (fields | settings, values)


def with_tensor(name: str, *shape: int) -> Form:
    return lambda fields, values: (fields, values | {name: np.zeros(shape, dtype=np.float32)})


def without_tensors(pattern: str) -> Form:
    return lambda fields, values: (fields, {n: v for n, v in values.items() if not re.search(pattern, n)})


def mlx_renamed(fields: Fields, values: Values) -> tuple[Fields, Values]:
    return fields, mlx(fields, values, base_info(BASE))[1]


WILD: dict[str, tuple[Form, str]] = {
    "key_default": (as_written_by("adapter name default"), SAME),
    "key_other_adapter_name": (as_written_by("adapter name of its own"), SAME),
    "key_orig_mod_inner": (as_written_by("torch.compile inside"), SAME),
    "key_orig_mod_outer": (as_written_by("torch.compile outside"), SAME),
    "key_orig_mod_layers": (as_written_by("torch.compile by layer"), SAME),
    "key_module_ddp": (as_written_by("DistributedDataParallel"), SAME),
    "key_fsdp": (as_written_by("FSDP"), SAME),
    "key_checkpoint_wrapper": (as_written_by("activation checkpointing"), SAME),
    "key_no_prefix": (as_written_by("no prefix"), SAME),
    "key_one_model_less": (as_written_by("no head"), SAME),
    "key_language_model_inner": (as_written_by("language_model inside"), SAME),
    "key_language_model_outer": (as_written_by("language_model outside"), SAME),
    "key_lora_without_weight": (as_written_by("loralib"), SAME),
    "key_diffusers": (as_written_by("diffusers"), SAME),
    "key_kohya": (as_written_by("kohya"), SAME),
    "key_extra_alpha": (as_written_by("alphas beside"), SAME),
    "key_embed_beside": (with_tensor("base_model.model.model.embed_tokens.weight", 8, 8), "expected"),
    "key_lm_head_beside": (with_tensor("base_model.model.lm_head.weight", 8, 8), "lm_head"),
    "key_missing_layer": (without_tensors(r"layers\.1\."), r"layers\.1\..* is missing.*; save the adapter again"),
    "key_missing_one_b": (without_tensors(r"1\.mlp\.up_proj\.lora_B"), r"layers\.1\.mlp\.up_proj\.lora_B.* is missing.*; save"),
    "key_too_many_layers": (with_tensor(f"{LAYERS}7.mlp.up_proj.lora_A.weight", 4, 64), "has 2 layers"),
    "key_moe_experts": (with_tensor(f"{LAYERS}0.mlp.experts.0.up_proj.lora_A.weight", 4, 64), "experts.*; train it on"),
    "key_fused_qkv": (with_tensor(f"{LAYERS}0.self_attn.qkv_proj.lora_A.weight", 4, 64), r"no projection.* self_attn\.q_proj.*; train"),
    "key_gpt_neox_style": (
        with_tensor("base_model.model.gpt_neox.layers.0.attention.query_key_value.lora_A.weight", 4, 64),
        "no projection",
    ),
    "full_state_dict_in_adapter_file": (with_tensor(f"{LAYERS}0.self_attn.q_proj.base_layer.weight", 64, 64), "of the base model"),
    "mlx_lm": (as_written_by("MLX-LM"), SAME),
    "mlx_lm_renamed": (mlx_renamed, SAME),
    "torchtune": (lambda f, v: ({n: f[n] for n in ("r", "lora_alpha", "target_modules", "peft_type")}, v), SAME),
    "torchtune_hand_written_no_peft_type": (lambda f, v: ({n: f[n] for n in ("r", "lora_alpha", "target_modules")}, v), "peft_type is missing"),
    "nemo_automodel": (
        lambda f, v: (f | {"target_modules": sorted({n.split(".lora_")[0].removeprefix("base_model.model.") for n in v})}, v),
        SAME,
    ),
    "megatron_bridge": (with_settings(auto_mapping=None, target_modules=sorted(PROJECTIONS), rank_pattern={}), SAME),
    "prime_rl": (with_settings(lora_alpha=8.0, lora_dropout=0.0, modules_to_save=None), SAME),
    "verl_model_merger_alpha_0": (with_settings(lora_alpha=0), "makes the scaling"),
    "tinker_raw": (with_tensor("base_model.model.model.unembed_tokens.lora_A.weight", 4, 64), r"LoRA on lm_head is read .* base_model\.model\.lm_head"),
    "ms_swift_old_tuner": (as_written_by("MS-Swift 2"), SAME),
    "unsloth": (with_settings(auto_mapping={"unsloth_fixed": True}, target_modules=UNSLOTH, task_type=None), SAME),
    "old_peft_0_2_fields": (with_settings(enable_lora=None, merge_weights=False), SAME),
    "old_peft_merge_weights_true": (with_settings(merge_weights=True), "unknown setting merge_weights.*; remove it"),
    "target_parameters": (
        with_settings(
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=[f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")],
        ),
        SAME,
    ),
    "cfg_lora_dtype": (with_settings(lora_dtype="bfloat16"), "unknown setting lora_dtype.*; remove it"),
    "cfg_no_peft_type": (with_settings(peft_type=None), "peft_type is missing"),
    "cfg_peft_type_lower": (with_settings(peft_type="lora"), 'peft_type "lora" is not served.*: write "LORA"'),
    "cfg_peft_type_enum_repr": (with_settings(peft_type="PeftType.LORA"), 'not served.*: write "LORA"'),
    "cfg_targets_null": (with_settings(target_modules=None), "target_modules is missing: name"),
    "cfg_targets_fewer_than_tensors": (with_settings(target_modules=["q_proj"]), "is not explained by.*; correct"),
    "cfg_task_seq_cls": (with_settings(task_type="SEQ_CLS"), 'task_type = "SEQ_CLS": only CAUSAL_LM is served; train'),
    "cfg_megatron": (with_settings(megatron_config={"tensor_model_parallel_size": 2}), "Megatron layers.*; train"),
    "cfg_use_qalora": (with_settings(use_qalora=True), "QALoRA is not served; train"),
    "bdlora": (with_settings(use_bdlora={"nblocks": 4}), "block-diagonal LoRA is not served; train"),
    "velora": (with_settings(velora_config={"num_groups": 64}), "VeLoRA is not served; train"),
    "monteclora": (with_settings(monteclora_config={"buffer_size": 150}), "MonteCLoRA is not served; train"),
    "kasa": (with_settings(kasa_config={"beta": 1e-4}), "KaSA is not served; train"),
    "arrow": (with_settings(arrow_config={"top_k": 1}), "Arrow routing is not served; serve its adapters"),
    "layer_replication": (with_settings(layer_replication=[[0, 1]]), "changes the base model's layers; train"),
    "p_tuning": (with_settings(peft_type="P_TUNING"), r'peft_type "P_TUNING" \(p-tuning\) is not served'),
}  # fmt: skip


@pytest.mark.parametrize("name", WILD)
def test_an_adapter_as_a_trainer_leaves_it_has_its_verdict(name: str) -> None:
    base = base_info(BASE)
    plain = adapter_config(RECIPE) | {"base_model_name_or_path": "tiny"}, adapter_tensors(base, RECIPE)
    form, verdict = WILD[name]

    def read(fields: Fields, values: Values) -> str:
        return canonicalise(
            read_checkpoint(json.dumps(fields).encode(), safetensors_bytes(values, "float32"), base)
        ).revision

    if verdict == SAME:
        assert read(*form(*plain)) == read(*plain)
        return
    with pytest.raises((AdapterIncompatibleError, AdapterCorruptUploadError), match=verdict):
        read(*form(*plain))


def saved_by(change: Callable[[Any], None] | None = None) -> Callable[[Path], None]:
    """Return a trainer's way to leave the base's tokenizer: loaded, perhaps changed, and saved by transformers."""

    def save(folder: Path) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(tiny_base_dir()))
        if change is not None:
            change(tokenizer)
        tokenizer.save_pretrained(str(folder))

    return save


def setting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda tokenizer: setattr(tokenizer, name, value)


def truncate(tokenizer: Any) -> None:
    tokenizer.pad_token = "<|eos|>"
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=16)


def files(**contents: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, content in contents.items():
            stem, _, suffix = name.rpartition("_")
            (folder / f"{stem}.{suffix}").write_text(content)

    return write


MARKED = CHAT_TEMPLATE.replace("{% if add", "{% generation %}{% endgeneration %}{% if add")
NAMED = {"default": CHAT_TEMPLATE, "tool_use": "{{ messages }}"}
LISTED = [{"name": name, "template": template} for name, template in NAMED.items()]
TOKENIZERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...] | str]] = {
    "tok_saved_by_this_transformers": (saved_by(), ()),
    "tok_pad_token_eos": (saved_by(setting("pad_token", "<|eos|>")), ()),
    "tok_padding_side_left": (saved_by(setting("padding_side", "left")), ()),
    "tok_used_with_truncation": (saved_by(truncate), ()),
    "tok_pad_token_added": (saved_by(lambda t: t.add_special_tokens({"pad_token": "[PAD]"})), ("added_tokens",)),
    "tok_added_tokens": (saved_by(lambda t: t.add_tokens(["<tool>"])), ("added_tokens",)),
    "tok_eos_changed": (saved_by(setting("eos_token", "<|im_start|>")), ("stop_tokens",)),
    "tok_template_changed": (saved_by(setting("chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")), ("chat_template",)),
    "tok_template_trailing_newline": (saved_by(setting("chat_template", CHAT_TEMPLATE + "\n")), ()),
    "tok_template_generation_marks": (saved_by(setting("chat_template", MARKED)), ()),
    "tok_named_templates": (saved_by(setting("chat_template", NAMED)), ()),
    "tok_named_templates_v4_list": (files(tokenizer_config_json=json.dumps({"chat_template": LISTED})), ()),
    "tok_template_list_of_one": (files(tokenizer_config_json=json.dumps({"chat_template": LISTED[:1]})), ()),
    "tok_template_only_jinja": (files(chat_template_jinja=CHAT_TEMPLATE), ()),
    "tok_added_tokens_json": (files(added_tokens_json='{"<|im_end|>": 3, "<|im_start|>": 2}'), ()),
    "tok_added_tokens_decoder_in_another_order": (
        files(tokenizer_config_json='{"added_tokens_decoder": {"3": {"content": "<|im_end|>"}, "0": {"content": "<|bos|>"}}}'),
        (),
    ),
    "tok_add_prefix_space_spelled_out": (files(tokenizer_config_json='{"add_prefix_space": false}'), ()),
    "tok_add_prefix_space_changed": (files(tokenizer_config_json='{"add_prefix_space": true}'), "add_prefix_space is true"),
    "tok_generation_defaults_spelled_out": (files(generation_config_json='{"temperature": 1.0, "top_p": 1.0}'), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_as_a_trainer_leaves_it_has_its_verdict(tmp_path: Path, name: str) -> None:
    write, verdict = TOKENIZERS[name]
    write(tmp_path)
    texts = {file: (tmp_path / file).read_bytes() for file in TEXT_FILES if (tmp_path / file).is_file()}

    if isinstance(verdict, str):
        with pytest.raises(AdapterIncompatibleError, match=verdict):
            check_tokenizer_files(texts, tiny_base_dir())
        return
    assert texts
    assert check_tokenizer_files(texts, tiny_base_dir()).parts.kinds == verdict


METHODS: dict[str, Any] = {
    "DoRA": LoraConfig(r=4, target_modules=list(PROJECTIONS), use_dora=True),
    "biases of B": LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_bias=True),
    "AdaLoRA": AdaLoraConfig(init_r=4, target_r=4, total_step=10, target_modules=["q_proj", "down_proj"]),
    "(IA)3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    "SHiRA": ShiraConfig(r=2, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_wrappers_are_left_out_of_the_names_of_every_method(tmp_path: Path, method: str) -> None:
    saved = save_trained(tmp_path, BASE, METHODS[method])
    config, weights = saved["adapter_config.json"], saved["adapter_model.safetensors"]
    header: dict[str, Any] = {}
    data, position = b"", 0
    for name, tensor in read_tensors(weights, file="adapter_model.safetensors").items():
        end = position + len(tensor.data)
        wrapped = "_orig_mod." + re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module.", name)
        header[wrapped] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        data, position = data + bytes(tensor.data), end

    def revision(weights: bytes) -> str:
        return canonicalise(read_checkpoint(config, weights, base_info(BASE), base_dir=base_dir(BASE))).revision

    assert revision(assemble(header, data)) == revision(weights)


def test_dora_of_mlx_and_torchtune_is_that_of_peft(tmp_path: Path) -> None:
    saved = save_trained(tmp_path, BASE, METHODS["DoRA"])
    config, weights = saved["adapter_config.json"], saved["adapter_model.safetensors"]
    base, fields = base_info(BASE), json.loads(config)
    values = {name: tensor.values() for name, tensor in read_tensors(weights, file="x").items()}
    expected = canonicalise(read_checkpoint(config, weights, base)).revision

    for written_fields, written in (mlx(fields, values, base), torchtune(fields, values, base)):
        data = json.dumps(written_fields).encode(), safetensors_bytes(written, "float32")
        assert canonicalise(read_checkpoint(*data, base)).revision == expected
