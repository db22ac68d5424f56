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

_KEY: Final = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<path>\w+(?:\.\w+)*)"
    r"\.lora_(?P<matrix>[AB])(?:\.default)?\.weight",
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
)
_MISPLACED: Final = (
    r"(?P<prefix>.*?)layers\.(?P<layer>0|[1-9]\d{{0,5}})\.(?P<between>(?:\w+\.)*?)(?P<path>{paths})"
    r"\.(?P<inside>(?:\w+\.)*?)lora_(?P<matrix>[AB])(?P<rest>(?:\.\w+)*)"
)
"""A tensor of one of the paths under another name than PEFT's."""
_MAX_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class TensorName:
    """The meaning of a tensor's name: one matrix of one projection.

    Attributes:
        path: Path of the projection inside its layer.
        matrix: ``A`` or ``B``.
    """

    layer: int
    path: str
    matrix: str

    @property
    def projection(self) -> str:
        """Name of the projection, unique within its layer."""
        return self.path.rpartition(".")[2]


def module_name(layer: int, path: str) -> str:
    """Return a projection's dotted name in the base model from its path inside the layer."""
    return f"model.layers.{layer}.{path}"


def tensor_name(module: str, matrix: str) -> str:
    """Return PEFT's name of a module's matrix in a file."""
    return f"base_model.model.{module}.lora_{matrix}.weight"


def parse_tensor_name(name: str, paths: Collection[str] | None = None) -> TensorName:
    """Read a tensor's name.

    Args:
        name: In the file.
        paths: Paths of the base model's projections inside their layers; all paths if None.

    Raises:
        AdapterIncompatibleError: If it is none that PEFT loads into one of them; the message says what it is.
    """
    match = _KEY.fullmatch(name)
    if match is None or (paths is not None and match["path"] not in paths):
        raise AdapterIncompatibleError(f"tensor {name[:_MAX_SHOWN]}: {_explained(name, paths or ())}")
    return TensorName(int(match["layer"]), match["path"], match["matrix"])


def _explained(name: str, paths: Collection[str]) -> str:
    for part, text in _TELLTALES:
        if part in name:
            return text
    pattern = _MISPLACED.format(paths="|".join(map(re.escape, paths)))
    match = re.fullmatch(pattern, name[:1000], re.ASCII) if paths else None
    if match is None:
        is_base = name.startswith("base_model.model.") and name.endswith(".weight") and "lora" not in name
        return _BASE_WEIGHT if is_base else "no projection of a served decoder layer"
    expected = tensor_name(module_name(int(match["layer"]), match["path"]), match["matrix"])
    return (
        f"PEFT would ignore it under this name; it loads {expected}. Save with save_pretrained of the unwrapped PEFT "
        "model, or rename the tensors"
    )
