"""PEFT's methods: the settings of those that are served, and why and with which remedy the others are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LORA, ADALORA, IA3, VERA, SHIRA, FLORA = "LORA", "ADALORA", "IA3", "VERA", "SHIRA", "FLORA"

# These concern training, or how the file was made; they do not change the inference. fan_in_fan_out is off in PEFT for
# layers that store weights as all served architectures do.
_COMMON_HARMLESS: Final = frozenset(
    {"auto_mapping", "revision", "inference_mode", "peft_version", "runtime_config", "fan_in_fan_out"}
)
_COMMON: Final = frozenset({"peft_type", "task_type", "target_modules", "base_model_name_or_path"})
_SAVED: Final = frozenset({"modules_to_save"})
"""Which modules outside of the layers are replaced; every method of PEFT has it, and other modules are refused."""
_TOKENS: Final = frozenset({"trainable_token_indices", "ensure_weight_tying"})
"""Which of their rows are replaced, and whether lm_head follows the embedding; LoRA has them, and so AdaLoRA."""
_LAYERS: Final = frozenset({"layers_to_transform", "layers_pattern"})
_LORA_HARMLESS: Final = frozenset(
    {
        "lora_dropout",
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),  # initialisation; see init_lora_weights
        *("megatron_core", "qalora_group_size"),  # act only together with megatron_config and use_qalora
        "tensor_model_parallel_size",  # says how Megatron wrote fused tensors; see the dialects
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """The settings of one ``peft_type`` beside those that all have.

    Attributes:
        used: Those that decide what is computed.
        harmless: Those that do not, whatever their value.
        refused: Those that are not served where they are on -> why not.
    """

    used: frozenset[str]
    harmless: frozenset[str] = frozenset()
    refused: dict[str, str]

    def knows(self, setting: str) -> bool:
        """Return whether it is one of the method's settings, as far as they are served."""
        return setting in _COMMON | _COMMON_HARMLESS | self.used | self.harmless


_INVOCATION: Final = "alora_invocation_tokens"
_INSTEAD: Final = "train LoRA or DoRA instead"
_REFUSED: Final = {
    "trainable_token_indices": f"only LoRA's token embeddings are served; {_INSTEAD}",
    _INVOCATION: f"only LoRA can be activated by a sequence of tokens; {_INSTEAD}",
    "megatron_config": "Megatron layers are not served; train on the base model's own layers, or save the adapter for them",
    "layer_replication": "it changes the base model's layers; train on a base model that has these layers itself",
    "use_qalora": f"QALoRA is not served; {_INSTEAD}",
    "use_bdlora": f"block-diagonal LoRA is not served; {_INSTEAD}",
    "velora_config": f"VeLoRA is not served; {_INSTEAD}",
    "monteclora_config": f"MonteCLoRA is not served; {_INSTEAD}",
    "arrow_config": "Arrow routing is not served; serve its adapters by themselves: each request chooses one",
    "kasa_config": f"KaSA is not served; {_INSTEAD}",
}

METHODS: Final[dict[str, Method]] = {
    LORA: Method(
        used=_LAYERS
        | {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules", "bias"}
        | {"use_dora", "lora_bias", "init_lora_weights", _INVOCATION}
        | _SAVED
        | _TOKENS
        | {"target_parameters"},  # the dialects turn it into target_modules, or refuse it
        harmless=_LORA_HARMLESS,
        refused={name: why for name, why in _REFUSED.items() if name not in _TOKENS | {_INVOCATION}},
    ),
    ADALORA: Method(
        used=_LAYERS
        | _SAVED
        | _TOKENS
        | {"init_r", "lora_alpha", "rank_pattern", "exclude_modules", "bias", "init_lora_weights"},
        harmless=_LORA_HARMLESS
        | {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
        | {"r", "use_rslora", "alpha_pattern"},  # PEFT's layers of AdaLoRA do not look at them
        refused={name: why for name, why in _REFUSED.items() if name not in _TOKENS}
        | {"target_parameters": "AdaLoRA on bare parameters is not served; name their modules in target_modules"}
        | {"use_dora": "PEFT has no DoRA for AdaLoRA", "lora_bias": "PEFT's AdaLoRA has no biases of its matrices"},
    ),
    IA3: Method(
        used=_SAVED | {"feedforward_modules", "exclude_modules"},
        harmless=frozenset({"init_ia3_weights"}),
        refused=_REFUSED,
    ),
    VERA: Method(
        used=_LAYERS | _SAVED | {"r", "bias", "save_projection"},
        harmless=frozenset({"projection_prng_key", "vera_dropout", "d_initial", "init_weights"}),
        refused=_REFUSED,
    ),
    SHIRA: Method(
        used=_SAVED | {"r"},
        harmless=frozenset({"mask_type", "random_seed", "init_weights"}),  # the file says where the values are
        refused=_REFUSED,
    ),
    FLORA: Method(
        used=_LAYERS | {"r", "rank_pattern", "exclude_modules"},
        refused=_REFUSED | {"modules_to_save": "FLoRA replaces no modules"},
    ),
}
"""What is served, by ``peft_type``; FLORA is a format of ours, as PEFT has no such tuner."""

_MERGE: Final = "merge it into the base model (merge_and_unload) and serve that, or train LoRA or DoRA"
_CONVERT: Final = (
    "convert it with PEFT's convert_to_lora, merge it into the base model (merge_and_unload) and serve that, or train LoRA "
    "or DoRA"
)
_VIRTUAL_TOKENS: Final = "train LoRA or DoRA instead: what it learnt are virtual tokens, which cannot be merged"

REFUSED_METHODS: Final[dict[str, tuple[str, str]]] = {
    "ADAMSS": ("AdaMSS's updates of subspaces", _MERGE),
    "ADAPTION_PROMPT": ("LLaMA-Adapter's prompts in attention", _VIRTUAL_TOKENS),
    "BEFT": ("BEFT's biases", _MERGE),
    "BOFT": ("BOFT's butterfly rotations", _MERGE),
    "BONE": ("Bone's block updates", _MERGE),
    "C3A": ("C3A's circular convolutions", _CONVERT),
    "CARTRIDGE": ("a trained cache of keys and values", _VIRTUAL_TOKENS),
    "CPT": ("context-aware prompt tuning", _VIRTUAL_TOKENS),
    "DEFT": ("DEFT's projections", _MERGE),
    "DELORA": ("DeLoRA's normalised pairs", _CONVERT),
    "FOURIERFT": ("FourierFT's spectral updates", _CONVERT),
    "FROD": ("FRoD's rotations", _MERGE),
    "GLORA": ("GLoRA's generalised updates", _MERGE),
    "GRALORA": ("GraLoRA's blocks of pairs", _CONVERT),
    "HIRA": ("HiRA's products with the base weights", _CONVERT),
    "HRA": ("HRA's reflections", _MERGE),
    "LILY": ("Lily's routed pairs", _INSTEAD),
    "LN_TUNING": ("trained norms", _MERGE),
    "LOHA": ("LoHa's Hadamard products of pairs", _CONVERT),
    "LOKR": ("LoKr's Kronecker products", _CONVERT),
    "MISS": ("MiSS's shared shards", _CONVERT),
    "MULTITASK_PROMPT_TUNING": ("multitask prompt tuning", _VIRTUAL_TOKENS),
    "OFT": ("OFT's rotations", _MERGE),
    "OSF": ("orthogonal subspace fine-tuning, which trains all of a matrix", _MERGE),
    "PEANUT": ("PEANuT's networks over weights", _MERGE),
    "POLY": ("Poly's mixture of skills", "train one LoRA or DoRA per task instead"),
    "PREFIX_TUNING": ("prefix tuning", _VIRTUAL_TOKENS),
    "PROMPT_TUNING": ("prompt tuning", _VIRTUAL_TOKENS),
    "PSOFT": ("PSOFT's rotations of subspaces", _CONVERT),
    "PVERA": ("PVeRA's random projections", _MERGE),
    "P_TUNING": ("p-tuning", _VIRTUAL_TOKENS),
    "RANDLORA": ("RandLoRA's sums of random pairs", _CONVERT),
    "ROAD": ("RoAd's rotations", _MERGE),
    "SHADOW": ("ShadowPEFT's parallel network", "train LoRA or DoRA instead: it cannot be merged"),
    "SUPERTUNING": ("Super-Tuning's sparse values", _MERGE),
    "TINYLORA": ("TinyLoRA's vectors", _CONVERT),
    "TRAINABLE_TOKENS": ("trained token embeddings", _MERGE),
    "UNILORA": ("Uni-LoRA's shared vector", _CONVERT),
    "VBLORA": ("VB-LoRA's vector bank", _CONVERT),
    "WAVEFT": ("WaveFT's wavelet updates", _CONVERT),
    "XLORA": ("X-LoRA's classifier over adapters", "serve its adapters by themselves: each request chooses one"),
}
"""PEFT's other types -> what they are, and what to do instead."""
