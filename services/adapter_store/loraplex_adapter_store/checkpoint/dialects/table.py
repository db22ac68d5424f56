"""The rules of all dialects: which program writes a form, where its source says so, and what PEFT would have written."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One form that is read.

    Attributes:
        program: What writes it.
        versions: Versions of the program that were read for this rule.
        source: Its source file.
        form: What a file looks like.
        meaning: What is made of it.
    """

    program: str
    versions: str
    source: str
    form: str
    meaning: str


_PEFT: Final = {"program": "PEFT", "versions": "0.10 to 0.21"}
_MLX: Final = {"program": "MLX-LM", "versions": "0.10 to 0.32"}
_TUNE: Final = {"program": "torchtune", "versions": "0.3 to 0.7", "source": "torchtune/models/convert_weights.py"}
_BRIDGE: Final = {"program": "Megatron-Bridge, NeMo", "versions": "Megatron-Core names"}
_BRIDGE_FILE: Final = {"source": "megatron/bridge/models/conversion/peft_bridge.py"}

RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "adapter_name": Rule(
            **_PEFT,
            source="peft/tuners/tuners_utils.py (state_dict of a PeftModel)",
            form="`lora_A.default.weight`: the adapter's name inside",
            meaning="the name is left out, as save_pretrained does; two names in one file are refused",
        ),
        "target_parameters": Rule(
            program="PEFT",
            versions="0.17 to 0.21",
            source="peft/tuners/lora/layer.py (ParamWrapper)",
            form="`target_parameters: [mlp.down_proj.weight]`",
            meaning="a projection's weight is the projection; other parameters and experts are refused",
        ),
        "compiled": Rule(
            program="torch.compile",
            versions="torch 2.0 to 2.9",
            source="torch/_dynamo/eval_frame.py (OptimizedModule)",
            form="`_orig_mod.` inside a name",
            meaning="it is left out",
        ),
        "parallel": Rule(
            program="DistributedDataParallel, DeepSpeed",
            versions="torch 2.0 to 2.9",
            source="torch/nn/parallel/distributed.py",
            form="`module.` inside a name",
            meaning="it is left out",
        ),
        "sharded": Rule(
            program="FSDP",
            versions="torch 2.0 to 2.9",
            source="torch/distributed/fsdp/_common_utils.py",
            form="`_fsdp_wrapped_module.` inside a name",
            meaning="it is left out",
        ),
        "recomputed": Rule(
            program="activation checkpointing",
            versions="torch 2.0 to 2.9",
            source="torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py",
            form="`_checkpoint_wrapped_module.` inside a name",
            meaning="it is left out",
        ),
        "multimodal": Rule(
            program="transformers (Unsloth, LLaMA-Factory, MS-Swift on models that also see or hear)",
            versions="4.40 to 5",
            source="transformers/models/*/modeling_*.py",
            form="`model.language_model.layers.` or `language_model.model.layers.`",
            meaning="`model.layers.` of the text model",
        ),
        "bare_names": Rule(
            program="MS-Swift, scripts that save the model's own state_dict",
            versions="2 and 3",
            source="swift/tuners/base.py",
            form="`model.layers.`: without `base_model.model.` in front",
            meaning="`base_model.model.` is put in front",
        ),
        "headless": Rule(
            program="PEFT on AutoModel (TRL, sentence-transformers)",
            versions="0.10 to 0.21",
            source="transformers/models/auto/modeling_auto.py",
            form="`base_model.model.layers.`: trained on the model without its lm_head",
            meaning="the same layers of the model with its lm_head",
        ),
        "swift_config": Rule(
            program="MS-Swift",
            versions="2",
            source="swift/tuners/lora.py (LoRAConfig)",
            form="`swift_type: LORA`, with `lora_dtype` and learning rates of LoRA+",
            meaning="settings of the training run, left out",
        ),
        "loralib": Rule(
            program="loralib",
            versions="0.1",
            source="loralib/layers.py (Linear)",
            form="`q_proj.lora_A` and `lora_B` as parameters, without `.weight`",
            meaning="the same matrices: A [rank, in], B [out, rank]",
        ),
        "mlx": Rule(
            **_MLX,
            source="mlx_lm/tuner/lora.py (LoRALinear)",
            form="`lora_a` [in, rank] and `lora_b` [rank, out]",
            meaning="A and B are their transposes",
        ),
        "mlx_dora": Rule(
            **_MLX,
            source="mlx_lm/tuner/dora.py (DoRALinear)",
            form="`m` [out]",
            meaning="DoRA's magnitude vector",
        ),
        "mlx_config": Rule(
            **_MLX,
            source="mlx_lm/tuner/utils.py (load_adapters)",
            form="`fine_tune_type`, `num_layers`, `lora_parameters: {rank, scale, keys}`",
            meaning="lora_alpha = scale * rank; the last num_layers layers; keys are the targets",
        ),
        "torchtune": Rule(
            **_TUNE,
            form="`layers.0.attn.q_proj.lora_a.weight`, `mlp.w1`, `output_proj`",
            meaning="names of Hugging Face; on Llama and Mistral the rows of q and k are put in their order",
        ),
        "meta": Rule(
            **_TUNE,
            form="`layers.0.attention.wq.lora_a.weight`, `feed_forward.w1` (Meta's names)",
            meaning="as torchtune's own names",
        ),
        "megatron": Rule(
            **_BRIDGE,
            **_BRIDGE_FILE,
            form="`decoder.layers.0.self_attention.linear_proj.adapter.linear_in.weight`, `linear_out`",
            meaning="A and B of o_proj and down_proj; `adapter_q` and its like name one projection each",
        ),
        "megatron_qkv": Rule(
            **_BRIDGE,
            source="megatron/bridge/models/conversion/param_mapping.py (split_qkv_weights)",
            form="`linear_qkv`: rows of B by query group: its heads of q, then k, then v",
            meaning="q_proj, k_proj and v_proj with one A; the base model's heads say which rows are whose",
        ),
        "megatron_fc1": Rule(
            **_BRIDGE,
            **_BRIDGE_FILE,
            form="`linear_fc1`: rows of B are gate, then up, if `tensor_model_parallel_size` is 1",
            meaning="gate_proj and up_proj with one A; without the setting it is refused, as joined shards interleave",
        ),
        "kohya": Rule(
            program="kohya-ss/sd-scripts, LyCORIS",
            versions="0.8",
            source="networks/lora.py (LoRAModule)",
            form="`lora_down.weight` and `lora_up.weight`; module names may be joined by `_` behind `lora_unet_`",
            meaning="down is A, up is B",
        ),
        "diffusers": Rule(
            program="diffusers",
            versions="0.14 to 0.35",
            source="diffusers/models/lora.py",
            form="`lora.down.weight` and `lora.up.weight`, or `lora_linear_layer.down.weight`",
            meaning="down is A, up is B",
        ),
        "alpha": Rule(
            program="kohya-ss/sd-scripts, diffusers",
            versions="0.8",
            source="networks/lora.py (LoRAModule)",
            form="a number `alpha` beside a module's matrices",
            meaning="must equal lora_alpha; is lora_alpha of its module if adapter_config.json has none",
        ),
    }
)


def markdown() -> str:
    """Return the table of rules as docs/adapters.md has it."""
    rows = [
        f"| {rule.program} | {rule.versions} | {rule.form} | {rule.meaning} | {rule.source} |"
        for rule in RULES.values()
    ]
    return "\n".join(
        ["| program | versions | form | read as | where it is written |", "| --- | --- | --- | --- | --- |", *rows]
    )
