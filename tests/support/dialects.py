"""Writes a PEFT adapter in the layouts of other programs: each function is a program's own way to save."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.base_model import BaseModelInfo
    from numpy.typing import NDArray

Values: TypeAlias = "dict[str, NDArray[np.float32]]"
Fields: TypeAlias = "dict[str, Any]"
Written: TypeAlias = "tuple[Fields, Values]"
PEFT_PREFIX = "base_model.model."


def renamed(rename: Callable[[str], str]) -> Callable[[Fields, Values, BaseModelInfo], Written]:
    """Return a writer that only gives tensors other names."""
    return lambda fields, values, _base: (fields, {rename(name): value for name, value in values.items()})


def mlx(fields: Fields, values: Values, _base: BaseModelInfo) -> Written:
    """MLX-LM: x @ lora_a @ lora_b times scale; its configuration holds the arguments of the training run."""
    tensors = {}
    for name, value in values.items():
        name = name.removeprefix(PEFT_PREFIX).removesuffix(".weight")
        name = name.replace("lora_A", "lora_a").replace("lora_B", "lora_b").replace("lora_magnitude_vector", "m")
        tensors[name] = value.T.copy() if value.ndim == 2 else value
    layers = {int(name.split(".")[2]) for name in tensors}
    config = {
        "fine_tune_type": "dora" if any(name.endswith(".m") for name in tensors) else "lora",
        "num_layers": len(layers),
        "lora_parameters": {"rank": fields["r"], "dropout": 0.0, "scale": fields["lora_alpha"] / fields["r"]},
        "model": fields["base_model_name_or_path"],
        **{"adapter_path": "adapters", "batch_size": 4, "iters": 100, "learning_rate": 1e-5, "seed": 0, "train": True},
    }
    return config, tensors


TUNE_NAMES = {
    "model.layers": "layers",
    "self_attn.o_proj": "attn.output_proj",
    "self_attn": "attn",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_magnitude_vector": "magnitude",
}
META_NAMES = {
    "attn.output_proj": "attention.wo",
    "attn.q_proj": "attention.wq",
    "attn.k_proj": "attention.wk",
    "attn.v_proj": "attention.wv",
    "mlp.w": "feed_forward.w",
}


def torchtune(fields: Fields, values: Values, base: BaseModelInfo, *, rotates: bool = True) -> Written:
    """torchtune: rows of q and k as Meta has them, by the inverse of `tune_to_peft_adapter_weights`."""
    tensors = {}
    for name, value in values.items():
        ours = name.removeprefix(PEFT_PREFIX)
        heads = base.num_heads if "q_proj" in name else base.num_kv_heads if "k_proj" in name else 0
        if heads and rotates and "lora_A" not in name:
            value = value.reshape(heads, 2, base.head_dim // 2, -1).swapaxes(1, 2).reshape(value.shape)
        for theirs, tune in TUNE_NAMES.items():
            ours = ours.replace(theirs, tune)
        tensors[ours] = value
    names = {"o_proj": "output_proj", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    return fields | {"target_modules": [names.get(each, each) for each in fields["target_modules"]]}, tensors


def meta(fields: Fields, values: Values, base: BaseModelInfo) -> Written:
    """torchtune's Meta format."""
    fields, tensors = torchtune(fields, values, base)

    def name_of(name: str) -> str:
        for tune, theirs in META_NAMES.items():
            name = name.replace(tune, theirs)
        return name

    return fields, {name_of(name): value for name, value in tensors.items()}


MEGATRON = {"o_proj": "self_attention.linear_proj", "down_proj": "mlp.linear_fc2"}
MEGATRON_TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def megatron(fields: Fields, values: Values, base: BaseModelInfo) -> Written:
    """Megatron-Core: one adapter on fused q, k, v (rows by query group) and on fused gate and up."""
    tensors = {}
    for layer in range(base.num_layers):
        at = f"{PEFT_PREFIX}model.layers.{layer}"
        for projection, module in MEGATRON.items():
            block = "self_attn" if projection == "o_proj" else "mlp"
            for ours, theirs in (("lora_A", "linear_in"), ("lora_B", "linear_out")):
                tensors[f"decoder.layers.{layer}.{module}.adapter.{theirs}.weight"] = values[
                    f"{at}.{block}.{projection}.{ours}.weight"
                ]
        q, k, v = (values[f"{at}.self_attn.{x}_proj.lora_B.weight"] for x in "qkv")
        groups, width, rank = base.num_kv_heads, base.head_dim, q.shape[1]
        by_group = [each.reshape(groups, -1, width, rank) for each in (q, k, v)]
        qkv = f"decoder.layers.{layer}.self_attention.linear_qkv.adapter"
        tensors[f"{qkv}.linear_in.weight"] = values[f"{at}.self_attn.q_proj.lora_A.weight"]
        tensors[f"{qkv}.linear_out.weight"] = np.concatenate(by_group, axis=1).reshape(-1, rank)
        fc1 = f"decoder.layers.{layer}.mlp.linear_fc1.adapter"
        gate, up = (values[f"{at}.mlp.{x}_proj.lora_B.weight"] for x in ("gate", "up"))
        tensors[f"{fc1}.linear_in.weight"] = values[f"{at}.mlp.gate_proj.lora_A.weight"]
        tensors[f"{fc1}.linear_out.weight"] = np.concatenate([gate, up])
    return fields | {"target_modules": MEGATRON_TARGETS, "tensor_model_parallel_size": 1}, tensors


def canonical_megatron(fields: Fields, values: Values, _base: BaseModelInfo) -> Written:
    """Megatron-Bridge's CanonicalLoRA: one adapter for each of the fused projections."""
    modules = MEGATRON | {f"{x}_proj": f"self_attention.linear_qkv.adapter.adapter_{x}" for x in "qkv"}
    modules |= {f"{x}_proj": f"mlp.linear_fc1.adapter.adapter_{x}" for x in ("gate", "up")}
    tensors = {}
    for name, value in values.items():
        found = re.fullmatch(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight", name)
        assert found is not None
        module = modules[found[2]]
        module += "" if ".adapter" in module else ".adapter"
        tensors[
            f"model.decoder.layers.{found[1]}.{module}.{'linear_in' if found[3] == 'A' else 'linear_out'}.weight"
        ] = value
    targets = ["linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_gate", "linear_fc1_up", "linear_fc2"]
    return fields | {"target_modules": targets}, tensors


def kohya(fields: Fields, values: Values, _base: BaseModelInfo) -> Written:
    """kohya's scripts: modules joined by ``_``, a number alpha beside each; lora_alpha is not written."""
    tensors: Values = {}
    for name, value in values.items():
        module, _, matrix = name.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
        joined = "lora_unet_" + module.replace(".", "_")
        tensors[f"{joined}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = value
        tensors[f"{joined}.alpha"] = np.array(fields["lora_alpha"], dtype=np.float32)
    return {name: value for name, value in fields.items() if name != "lora_alpha"}, tensors


def with_alphas(fields: Fields, values: Values, _base: BaseModelInfo) -> Written:
    """PEFT's names, and a number alpha beside each module's matrices."""
    alphas = {
        name.replace("lora_A.weight", "alpha"): np.array(fields["lora_alpha"], dtype=np.float32)
        for name in values
        if "lora_A" in name
    }
    return fields, values | alphas


def old_swift(fields: Fields, values: Values, base: BaseModelInfo) -> Written:
    """MS-Swift 2: the model's own names with the adapter's inside, and settings of the run in the configuration."""
    extra = {
        "swift_type": "LORA",
        "model_key_mapping": None,
        "lora_dtype": "bf16",
        "lorap_lr_ratio": 16.0,
        "lorap_emb_lr": 1e-6,
    }
    _, tensors = renamed(lambda name: name.removeprefix(PEFT_PREFIX).replace(".weight", ".default.weight"))(
        fields, values, base
    )
    return fields | extra, tensors


def diffusers(name: str) -> str:
    """Return a name as diffusers writes it."""
    return name.removeprefix(PEFT_PREFIX).replace("lora_A", "lora.down").replace("lora_B", "lora.up")


LAYER = re.compile(r"(layers\.\d+)\.")
WRITERS: dict[str, tuple[Callable[[Fields, Values, BaseModelInfo], Written], set[str]]] = {
    "PEFT": (renamed(lambda name: name), set()),
    "adapter name default": (renamed(lambda n: n.replace(".weight", ".default.weight")), {"adapter_name"}),
    "adapter name of its own": (renamed(lambda n: n.replace(".weight", ".mine.weight")), {"adapter_name"}),
    "torch.compile inside": (renamed(lambda n: n.replace("base_model.model.", "base_model.model._orig_mod.")), {"compiled"}),
    "torch.compile outside": (renamed(lambda n: f"_orig_mod.{n}"), {"compiled"}),
    "torch.compile by layer": (renamed(lambda n: LAYER.sub(r"\1._orig_mod.", n)), {"compiled"}),
    "DistributedDataParallel": (renamed(lambda n: f"module.{n}"), {"parallel"}),
    "FSDP": (renamed(lambda n: "_fsdp_wrapped_module." + LAYER.sub(r"\1._fsdp_wrapped_module.", n)), {"sharded"}),
    "activation checkpointing": (renamed(lambda n: LAYER.sub(r"\1._checkpoint_wrapped_module.", n)), {"recomputed"}),
    "no prefix": (renamed(lambda n: n.removeprefix(PEFT_PREFIX)), {"bare_names"}),
    "no head": (renamed(lambda n: n.replace("model.model.model.", "model.model.")), {"headless"}),
    "language_model inside": (renamed(lambda n: n.replace("model.model.layers", "model.model.language_model.layers")), {"multimodal"}),
    "language_model outside": (renamed(lambda n: n.replace("model.model.model.", "model.model.language_model.model.")), {"multimodal"}),
    "loralib": (renamed(lambda n: n.removesuffix(".weight")), {"loralib"}),
    "diffusers": (renamed(diffusers), {"diffusers"}),
    "diffusers by layer": (renamed(lambda n: diffusers(n).replace("lora.", "lora_linear_layer.")), {"diffusers"}),
    "kohya": (kohya, {"kohya", "alpha"}),
    "alphas beside": (with_alphas, {"alpha"}),
    "MLX-LM": (mlx, {"mlx", "mlx_config"}),
    "torchtune": (torchtune, {"torchtune"}),
    "torchtune, Meta's names": (meta, {"meta"}),
    "Megatron": (megatron, {"megatron", "megatron_qkv", "megatron_fc1"}),
    "Megatron, canonical": (canonical_megatron, {"megatron"}),
    "MS-Swift 2": (old_swift, {"swift_config", "bare_names", "adapter_name"}),
}  # fmt: skip
"""What writes -> (its function, the rules that must read it)."""
