"""The names of a checkpoint's tensors: PEFT's names are read, all others are explained and refused.

Names of other programs have become PEFT's before (`dialects`). PEFT ignores tensors with names that it does not know, and
goes on as if the adapter were untrained there. So a tensor that no rule knows is refused, and the message says what its
name would have to be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterIncompatibleError

if TYPE_CHECKING:
    from collections.abc import Collection

LORA_A, LORA_B, LORA_B_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"
ADALORA_A, ADALORA_B, ADALORA_E, ADALORA_RANK = "lora_A", "lora_B", "lora_E", "ranknum"
IA3 = "ia3_l"
VERA_B, VERA_D = "vera_lambda_b", "vera_lambda_d"
SHIRA_VALUES, SHIRA_INDICES = "shira_weight", "shira_indices"
ADAPTED_BIAS, OTHER_BIAS = "base_layer.bias", "bias"
"""The base's bias as it was trained: of a projection that is adapted, of another one."""
PAIR: Final = frozenset({LORA_A, LORA_B})
SLOTS: Final = frozenset(
    {
        *(*PAIR, LORA_B_BIAS, MAGNITUDE, ADALORA_A, ADALORA_B, ADALORA_E, ADALORA_RANK, IA3, VERA_B, VERA_D),
        *(SHIRA_VALUES, SHIRA_INDICES, ADAPTED_BIAS, OTHER_BIAS),
    }
)
"""What a tensor is to its module: the end of its name, as `_KEY` reads it, without an adapter's name."""
SHARED_VERA: Final = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
"""Tensors that all modules of a checkpoint share."""

_KEY: Final = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<path>\w+(?:\.\w+)*?)"
    r"\.(?P<slot>lora_[ABE]|lora_magnitude_vector|ranknum|ia3_l|vera_lambda_[bd]|shira_weight|shira_indices|base_layer\.bias|bias)"
    r"(?:\.default)?(?P<end>\.weight|\.bias)?",
    re.ASCII,
)
_BASE_WEIGHT: Final = "a weight of the base model: save the adapter alone (save_pretrained of the PEFT model)"
_TELLTALES: Final = (
    ("lora_embedding", "LoRA on an embedding is read of base_model.model.model.embed_tokens alone"),
    ("unembed_tokens", "LoRA on lm_head is read under the name base_model.model.lm_head alone"),  # Tinker's name
    ("embed_tokens", "a trained embedding is read under the name base_model.model.model.embed_tokens alone"),
    ("lm_head", "LoRA on or a trained lm_head is read under the name base_model.model.lm_head alone"),
    (
        "modules_to_save",
        "trained modules other than embed_tokens and lm_head are not served; train LoRA or DoRA of projections",
    ),
    ("lora_magnitude_vector", "PEFT takes DoRA's magnitudes only with use_dora = true"),
    (".lora_B.bias", "PEFT takes biases of LoRA matrices only with lora_bias = true"),
    (".bias", "biases are served only of projections, and only as PEFT's bias and lora_bias announce them"),
    ("ia3_l", "only peft_type IA3 has it"),
    ("vera_", "only peft_type VERA has it"),
    ("shira_", "only peft_type SHIRA has it"),
    (".lora_E", "only peft_type ADALORA has it"),
    (".ranknum", "only peft_type ADALORA has it"),
    (".experts.", "LoRA on the experts of a mixture is not served; train it on the projections of attention"),
    ("base_layer.", _BASE_WEIGHT),
)
_MISPLACED: Final = (
    r"(?P<prefix>.*?)layers\.(?P<layer>0|[1-9]\d{{0,5}})\.(?P<between>(?:\w+\.)*?)(?P<path>{paths})"
    r"\.(?P<inside>(?:\w+\.)*?)lora_(?P<matrix>[AB])(?P<rest>(?:\.\w+)*)"
)
"""A tensor of one of the paths under another name than PEFT's."""
_MAX_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class TensorName:
    """The meaning of a tensor's name: one tensor of one projection.

    Attributes:
        path: Path of the projection inside its layer.
        slot: What it is there, one of `SLOTS`.
    """

    layer: int
    path: str
    slot: str

    @property
    def projection(self) -> str:
        """Name of the projection, unique within its layer."""
        return self.path.rpartition(".")[2]


def module_name(layer: int, path: str) -> str:
    """Return a projection's dotted name in the base model from its path inside the layer."""
    return f"model.layers.{layer}.{path}"


def tensor_name(module: str, slot: str) -> str:
    """Return PEFT's name of a module's tensor in a file.

    Args:
        module: The module's dotted name in the base model.
        slot: One of `SLOTS`.
    """
    return f"base_model.model.{module}.{slot}"


def parse_tensor_name(
    name: str, paths: Collection[str] | None = None, slots: Collection[str] = PAIR, in_file: str | None = None
) -> TensorName:
    """Read a tensor's name.

    Args:
        name: As PEFT would write it.
        paths: Paths of the base model's projections inside their layers; all paths if None.
        slots: Which tensors of a module the checkpoint's configuration announces.
        in_file: Its name in the file, if that is another; for messages.

    Raises:
        AdapterIncompatibleError: If it is none that PEFT loads into one of them; the message says what it is.
    """
    match = _KEY.fullmatch(name)
    slot = _slot(match) if match is not None else ""
    if match is None or slot not in slots or (paths is not None and match["path"] not in paths):
        raise AdapterIncompatibleError(f"tensor {(in_file or name)[:_MAX_SHOWN]}: {_explained(name, paths or ())}")
    return TensorName(int(match["layer"]), match["path"], slot)


def _slot(match: re.Match[str]) -> str:
    """Return what a name ends with; PEFT's DoRA had no ``.weight`` at first, then had it in memory only."""
    slot, end = match["slot"], match["end"] or ""
    return slot if slot == MAGNITUDE and end != ".bias" else slot + end


def _explained(name: str, paths: Collection[str]) -> str:
    for part, text in _TELLTALES:
        if part in name:
            return text
    pattern = _MISPLACED.format(paths="|".join(map(re.escape, paths)))
    match = re.fullmatch(pattern, name[:1000], re.ASCII) if paths else None
    if match is None:
        is_base = name.startswith("base_model.model.") and name.endswith(".weight") and "lora" not in name
        known = f", whose projections are {', '.join(sorted(paths))}" if paths else ""
        return (
            _BASE_WEIGHT
            if is_base
            else f"no projection of a served decoder layer{known}; train on these, or convert it"
        )
    expected = tensor_name(module_name(int(match["layer"]), match["path"]), f"lora_{match['matrix']}.weight")
    return (
        f"PEFT would ignore it under this name; it loads {expected}. Save with save_pretrained of the unwrapped PEFT "
        "model, or rename the tensors"
    )
