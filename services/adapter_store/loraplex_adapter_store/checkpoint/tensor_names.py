"""The names of a checkpoint's tensors: PEFT's names are read, all others are explained and refused.

PEFT ignores tensors with names that it does not know, and goes on as if the adapter were untrained there. So no tensor
is renamed here: the message says what the name would have to be, and which program writes the other name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from loraplex_common.adapter_image import PROJECTIONS
from loraplex_common.errors import AdapterIncompatibleError

BLOCKS: Final = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in PROJECTIONS}
_KEY: Final = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<block>self_attn|mlp)\."
    r"(?P<projection>[a-z]+_proj))\.lora_(?P<matrix>[AB])(?:\.default)?\.weight",
    re.ASCII,
)
_BASE_WEIGHT: Final = "a weight of the base model: save the adapter alone (save_pretrained of the PEFT model)"
_TELLTALES: Final = (
    ("lora_magnitude_vector", "DoRA's magnitude vectors are not served"),
    ("lora_embedding", "LoRA on embeddings is not served"),
    ("embed_tokens", "trained embeddings are not served"),
    ("lm_head", "LoRA on or a trained lm_head is not served"),
    ("modules_to_save", "fully trained modules are not served"),
    (".bias", "biases are not served"),
    (".experts.", "LoRA on the experts of a mixture is not served"),
    ("base_layer.", _BASE_WEIGHT),
    (".lora_a", "as MLX (mlx-lm) names and transposes matrices; convert the adapter to PEFT's form"),
    (".lora_b", "as MLX (mlx-lm) names and transposes matrices; convert the adapter to PEFT's form"),
    ("lora_down", "as tools for diffusion models name matrices (kohya); convert the adapter to PEFT's form"),
    ("lora_up", "as tools for diffusion models name matrices (kohya); convert the adapter to PEFT's form"),
    ("lora.down", "as tools for diffusion models name matrices (diffusers); convert the adapter to PEFT's form"),
    ("lora.up", "as tools for diffusion models name matrices (diffusers); convert the adapter to PEFT's form"),
    (".alpha", "alpha is read from adapter_config.json only"),
)
_WRAPPERS: Final = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "language_model": "a model that also sees or hears",
}
_PROJECTION: Final = re.compile(
    r"(?P<prefix>.*?)layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<between>(?:\w+\.)*?)(?P<block>self_attn|mlp)\.(?P<projection>[a-z]+_proj)"
    r"\.(?P<inside>(?:\w+\.)*?)lora_(?P<matrix>[AB])(?P<rest>(?:\.\w+)*)",
    re.ASCII,
)
_MAX_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class TensorName:
    """The meaning of a tensor's name: one matrix of one projection.

    Attributes:
        matrix: ``A`` or ``B``.
    """

    layer: int
    projection: str
    matrix: str


def module_name(layer: int, projection: str) -> str:
    """Return a projection's dotted name in the base model."""
    return f"model.layers.{layer}.{BLOCKS[projection]}.{projection}"


def tensor_name(layer: int, projection: str, matrix: str) -> str:
    """Return PEFT's name of a matrix in a file."""
    return f"base_model.model.{module_name(layer, projection)}.lora_{matrix}.weight"


def parse_tensor_name(name: str) -> TensorName:
    """Read a tensor's name.

    Raises:
        AdapterIncompatibleError: If PEFT would not load it into a served projection; the message explains the name.
    """
    match = _KEY.fullmatch(name)
    if match is None or BLOCKS.get(match["projection"]) != match["block"]:
        raise AdapterIncompatibleError(f"tensor {name[:_MAX_SHOWN]}: {_explained(name)}")
    return TensorName(int(match["layer"]), match["projection"], match["matrix"])


def _explained(name: str) -> str:
    for part, text in _TELLTALES:
        if part in name:
            return text
    match = _PROJECTION.fullmatch(name[:1000])
    if match is None or BLOCKS.get(match["projection"]) != match["block"]:
        is_base = name.startswith("base_model.model.") and name.endswith(".weight") and "lora" not in name
        return _BASE_WEIGHT if is_base else "no projection of a served decoder layer"
    expected = tensor_name(int(match["layer"]), match["projection"], match["matrix"])
    reasons = [f"'{part}.' comes from {_WRAPPERS[part]}" for part in _WRAPPERS if part in name.split(".")]
    adapter = match["rest"].removesuffix(".weight").strip(".")
    if adapter and adapter != "default":
        reasons.append(f"'{adapter}' is an adapter's name, which save_pretrained leaves out")
    if not name.startswith("base_model.model."):
        reasons.append("'base_model.model.' is missing in front")
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return (
        f"PEFT would ignore it under this name{why}; it loads {expected}. Save with save_pretrained of the unwrapped PEFT "
        "model, or rename the tensors"
    )
