"""Tensors of modules outside of the decoder layers: the embedding and lm_head, as PEFT names them.

Sources: PEFT 0.21, ``utils/other.py`` (ModulesToSaveWrapper, TrainableTokensWrapper), ``utils/save_and_load.py`` (embedding
layers), ``tuners/lora/layer.py`` (Embedding, Linear).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias

from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_common.base_model import BaseModelInfo

    from loraplex_adapter_store.checkpoint.safetensors_file import Tensor

EMBED, HEAD = "embed_tokens", "lm_head"
A, B = "lora_A.weight", "lora_B.weight"
EMBED_A, EMBED_B = "lora_embedding_A", "lora_embedding_B"
WEIGHT = "weight"
"""The trained matrix of ``modules_to_save``; of a module that is not adapted, a copy of the base's (save_embedding_layers)."""
SAVED_COPY = "modules_to_save.weight"
"""The trained matrix once more, in files that also hold copies of the base's."""
ORIGINAL, ADAPTED_BASE, TOKENS_BASE = "original_module.weight", "base_layer.weight", "token_adapter.base_layer.weight"
"""Copies of the base's matrix: of a module of ``modules_to_save``, of one with LoRA, of one with trained tokens."""
TOKENS = "token_adapter.trainable_tokens_delta"
"""Values, not differences, of the rows of ``trainable_token_indices``, in their order."""
SLOTS: Final = frozenset({A, B, EMBED_A, EMBED_B, WEIGHT, SAVED_COPY, ORIGINAL, ADAPTED_BASE, TOKENS_BASE, TOKENS})
PAIRS: Final = {EMBED: (EMBED_A, EMBED_B), HEAD: (A, B)}
"""What a module's pair is called: A ``[rank, in]``, B ``[out, rank]``; of the embedding, ``in`` are tokens."""

_KEY: Final = re.compile(
    r"(?P<slot>modules_to_save|lora_embedding_[AB]|token_adapter\.trainable_tokens_delta|lora_[AB])"
    r"\.default(?P<end>\.weight)?",
    re.ASCII,
)
"""A slot with PEFT's default name of an adapter inside."""
_TELLTALES: Final = (
    ("lora_magnitude_vector", "DoRA of the embedding or of lm_head is not served: train it with plain LoRA"),
    ("bias", "a bias of lm_head is not served"),
)
_MAX_SHOWN: Final = 200

OutsideTensors: TypeAlias = dict[str, dict[str, "Tensor"]]
"""Name of a module -> its tensors by slot."""


def split_outside(tensors: Mapping[str, Tensor], base: BaseModelInfo) -> tuple[dict[str, Tensor], OutsideTensors]:
    """Take the tensors of modules outside of the layers from a checkpoint's.

    Args:
        tensors: All, by PEFT's names.
        base: The base model, which says what lies outside of its layers.

    Returns:
        The others, and those.

    Raises:
        AdapterIncompatibleError: If one of them is none that PEFT loads there; the message has its name.
        AdapterCorruptUploadError: If one comes twice.
    """
    served = [each for each in base.outside if each.name in PAIRS]
    inside: dict[str, Tensor] = {}
    outside: OutsideTensors = {}
    for name, tensor in tensors.items():
        found = next((each for each in served if name.startswith(f"base_model.model.{each.path}.")), None)
        if found is None:
            inside[name] = tensor
            continue
        slot = _slot(name.removeprefix(f"base_model.model.{found.path}."))
        if (
            slot not in SLOTS
            or (slot in (A, B) and found.name == EMBED)
            or (slot in (EMBED_A, EMBED_B) and found.name != EMBED)
        ):
            raise AdapterIncompatibleError(f"tensor {name[:_MAX_SHOWN]}: {_explained(slot, found.name)}")
        of_module = outside.setdefault(found.name, {})
        if slot in of_module:
            raise AdapterCorruptUploadError(
                f"tensor {name[:_MAX_SHOWN]} appears twice, under another spelling as {of_module[slot].name[:_MAX_SHOWN]}"
            )
        of_module[slot] = tensor
    return inside, outside


def _slot(rest: str) -> str:
    match = _KEY.fullmatch(rest)
    return match["slot"] + (match["end"] or "") if match is not None else rest


def _explained(slot: str, name: str) -> str:
    for part, text in _TELLTALES:
        if part in slot:
            return text
    pair = " and ".join(PAIRS[name])
    return f"PEFT loads of {name} its weight, {TOKENS}, and of LoRA {pair}"
