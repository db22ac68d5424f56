"""Tensor names of all dialects of modules outside of the decoder layers: the embedding and lm_head."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from loraplex_adapter_store.checkpoint.outside_names import EMBED, HEAD, PAIRS, SLOTS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_MODULE: Final = re.compile(rf"(?P<prefix>(?:\w+\.)*?)(?P<name>{EMBED}|{HEAD})\.(?P<part>.+)", re.ASCII)
_HEAD_PREFIXES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "base_model.model.": (),
        "": ("bare_names",),
        "base_model.model.language_model.": ("multimodal",),
        "language_model.": ("bare_names", "multimodal"),
    }
)
"""What stands before ``lm_head.`` -> rules."""
_NAMED: Final = re.compile(
    r"(?P<part>modules_to_save|lora_embedding_[AB]|lora_[AB]|token_adapter\.trainable_tokens_delta)"
    r"\.(?!(?:weight|bias)(?:\.|$))(?P<adapter>[^.]+)(?P<end>\.weight)?",
    re.ASCII,
)
_TUNE: Final = re.compile(r"output\.lora_(?P<matrix>[ab])\.weight", re.ASCII)
_MLX: Final = ("lora_a", "lora_b")


def read_outside_name(
    name: str, prefixes: Mapping[str, tuple[str, ...]], paths: Collection[str]
) -> tuple[str, str, tuple[str, ...], str] | None:
    """Read a name of which wrappers' parts are left out.

    Args:
        name: The name.
        prefixes: What may stand before the embedding, as before the layers beside it -> rules.
        paths: Paths of the base model's modules outside of its layers.

    Returns:
        Path of the module, PEFT's name of the tensor there, the rules that say so, the adapter's name in it; None if no
        rule knows it.
    """
    by_name = {path.rpartition(".")[2]: path for path in paths}
    if (found := _TUNE.fullmatch(name)) is not None and HEAD in by_name:
        return by_name[HEAD], PAIRS[HEAD][found["matrix"] == "b"], ("torchtune",), ""
    found = _MODULE.fullmatch(name)
    if found is None or found["name"] not in by_name:
        return None
    module, part = found["name"], found["part"]
    rules = (_HEAD_PREFIXES if module == HEAD else prefixes).get(found["prefix"])
    if rules is None or rules == ("megatron",):
        return None
    if part in _MLX:  # MLX-LM does not wrap a model, so its names have no prefix that could be missing
        kept = tuple(each for each in rules if each != "bare_names")
        return by_name[module], PAIRS[module][_MLX.index(part)], (*kept, "mlx"), ""
    if (named := _NAMED.fullmatch(part)) is not None:
        return by_name[module], named["part"] + (named["end"] or ""), (*rules, "adapter_name"), named["adapter"]
    return (by_name[module], part, rules, "") if part in SLOTS else None
