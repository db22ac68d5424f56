"""Tensor names of all dialects: which layer, which module, which part of it, and by which rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from loraplex_adapter_store.checkpoint.dialects.outside import read_outside_name
from loraplex_adapter_store.checkpoint.tensor_names import SLOTS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

WRAPPERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "_orig_mod": "compiled",
        "module": "parallel",
        "_fsdp_wrapped_module": "sharded",
        "_checkpoint_wrapped_module": "recomputed",
    }
)
"""Part of a name that a wrapper adds -> rule."""
PEFT_PREFIX: Final = "base_model.model.model."
OUTSIDE: Final = -1
"""Stands for the layer of a module that is in none."""
_PREFIXES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        PEFT_PREFIX: (),
        "model.": ("bare_names",),
        "base_model.model.model.language_model.": ("multimodal",),
        "base_model.model.language_model.model.": ("multimodal",),
        "model.language_model.": ("bare_names", "multimodal"),
        "language_model.model.": ("bare_names", "multimodal"),
        "base_model.model.": ("headless",),
        "": ("bare_names", "headless"),
        "decoder.": ("megatron",),
        "model.decoder.": ("megatron",),
    }
)
"""What stands before ``layers.`` -> rules."""
_LAYER: Final = re.compile(r"(?P<prefix>(?:\w+\.)*?)layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<rest>.+)", re.ASCII)
_JOINED: Final = re.compile(
    r"(?:lora_(?:unet|te\d?)_|lycoris_|lora_)?model_layers_(?P<layer>0|[1-9]\d{0,5})_(?P<path>\w+)\.(?P<rest>.+)",
    re.ASCII,
)
_TUNE_PATHS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {f"attn.{name}": ("torchtune", f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")}
    | {"attn.output_proj": ("torchtune", "self_attn.o_proj")}
    | {
        f"mlp.{name}": ("torchtune", f"mlp.{ours}")
        for name, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    }
    | {f"attention.w{x}": ("meta", f"self_attn.{x}_proj") for x in "qkvo"}
    | {
        f"feed_forward.{name}": ("meta", f"mlp.{ours}")
        for name, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    }
)
_MEGATRON_PATHS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "self_attention.linear_qkv.adapter": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention.linear_qkv.adapter.adapter_q": ("self_attn.q_proj",),
        "self_attention.linear_qkv.adapter.adapter_k": ("self_attn.k_proj",),
        "self_attention.linear_qkv.adapter.adapter_v": ("self_attn.v_proj",),
        "self_attention.linear_proj.adapter": ("self_attn.o_proj",),
        "mlp.linear_fc1.adapter": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.linear_fc1.adapter.adapter_gate": ("mlp.gate_proj",),
        "mlp.linear_fc1.adapter.adapter_up": ("mlp.up_proj",),
        "mlp.linear_fc2.adapter": ("mlp.down_proj",),
    }
)
A, B, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "alpha"
_PARTS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "lora_A": ("loralib", A),
        "lora_B": ("loralib", B),
        "lora_a": ("mlx", A),
        "lora_b": ("mlx", B),
        "m": ("mlx_dora", MAGNITUDE),
        "lora_down.weight": ("kohya", A),
        "lora_up.weight": ("kohya", B),
        "lora.down.weight": ("diffusers", A),
        "lora.up.weight": ("diffusers", B),
        "lora_linear_layer.down.weight": ("diffusers", A),
        "lora_linear_layer.up.weight": ("diffusers", B),
        "alpha": ("alpha", ALPHA),
    }
)
"""What stands behind a module's name -> (rule, PEFT's name for it)."""
_TUNE_PARTS: Final = MappingProxyType({"lora_a.weight": A, "lora_b.weight": B, "magnitude": MAGNITUDE})
_MEGATRON_PARTS: Final = MappingProxyType({"linear_in.weight": A, "linear_out.weight": B})
_NAMED: Final = re.compile(
    r"(?P<part>lora_[AB]|lora_magnitude_vector|lora_E|lora_embedding_[AB]|ranknum|ia3_l|vera_lambda_[bd]|shira_weight|shira_indices)"
    r"\.(?!(?:weight|bias)(?:\.|$))(?P<adapter>[^.]+)(?P<end>\.weight|\.bias)?",
    re.ASCII,
)
_SHARED: Final = re.compile(r"(base_model\.vera_[AB])\.(\w+)", re.ASCII)
_OWN_PARTS: Final = frozenset({*SLOTS, *(slot.removesuffix(".weight") for slot in SLOTS)})
"""What PEFT itself writes behind a module's name; some versions with ``.weight`` at the end, some without."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a tensor's name means.

    Attributes:
        layer: `OUTSIDE` for a module that is in none; its path is then its whole name.
        paths: The modules of its layer that it belongs to; several if it is fused.
        part: PEFT's name of what it is, e.g. `A`.
        rules: The rules that say so; none for PEFT's own name.
        adapter: Name of the adapter, if the name contains one.
    """

    layer: int
    paths: tuple[str, ...]
    part: str
    rules: tuple[str, ...] = ()
    adapter: str = ""

    def names(self) -> list[str]:
        """Return PEFT's names of it, one for each module."""
        if self.layer == OUTSIDE:
            return [f"base_model.model.{path}.{self.part}" for path in self.paths]
        return [f"{PEFT_PREFIX}layers.{self.layer}.{path}.{self.part}" for path in self.paths]


def unwrapped(name: str) -> tuple[str, tuple[str, ...]]:
    """Return a name without the parts that wrappers add, and the rules for them."""
    parts = name.split(".")
    found = tuple(dict.fromkeys(WRAPPERS[part] for part in parts if part in WRAPPERS))
    return (".".join(part for part in parts if part not in WRAPPERS), found) if found else (name, ())


def multimodal_prefix(names: Collection[str]) -> str:
    """Return what the text model's modules begin with in the multimodal model whose tensors have these names."""
    inside = "model.language_model."
    return inside if any(inside in unwrapped(name)[0] for name in names) else "language_model.model."


def shared_name(name: str) -> tuple[str, str]:
    """Return PEFT's name of a tensor that all modules share, and the adapter's name in it, empty if there is none."""
    found = _SHARED.fullmatch(name)
    return (found[1], found[2]) if found is not None else (name, "")


def read_name(
    name: str, paths: Collection[str], own: Collection[str] = (), outside: Collection[str] = ()
) -> Reading | None:
    """Read a tensor's name.

    Args:
        name: In the file.
        paths: Paths of the base model's projections inside their layers.
        own: Ends of names that mean something else in this checkpoint than in a dialect.
        outside: Paths of the base model's modules outside of its layers.

    Returns:
        Its meaning; None if no rule knows it.
    """
    bare, wrappers = unwrapped(name)
    if (beside := read_outside_name(bare, _PREFIXES, outside)) is not None:
        path, part, rules, adapter = beside
        return Reading(OUTSIDE, (path,), part, (*wrappers, *rules), adapter)
    found = _LAYER.fullmatch(bare)
    if found is None or found["prefix"] not in _PREFIXES:
        reading = _joined(bare, paths)
    elif _PREFIXES[found["prefix"]] == ("megatron",):
        reading = _megatron(int(found["layer"]), found["rest"])
    else:
        reading = _dotted(int(found["layer"]), found["rest"], _PREFIXES[found["prefix"]], paths, own)
    if reading is None:
        return None
    return Reading(reading.layer, reading.paths, reading.part, (*wrappers, *reading.rules), reading.adapter)


def _dotted(
    layer: int, rest: str, prefix_rules: tuple[str, ...], paths: Collection[str], own: Collection[str]
) -> Reading | None:
    for path, (rule, ours) in _TUNE_PATHS.items():
        part = rest.removeprefix(f"{path}.")
        if part in _TUNE_PARTS and part != rest and prefix_rules == _PREFIXES[""]:
            return Reading(layer, (ours,), _TUNE_PARTS[part], (rule,))
    at = next((each for each in paths if rest.startswith(f"{each}.")), None)
    if at is None:
        return None
    part = rest[len(at) + 1 :]
    if (named := _NAMED.fullmatch(part)) is not None:
        rules = (*prefix_rules, "adapter_name")
        return Reading(layer, (at,), named["part"] + (named["end"] or ""), rules, named["adapter"])
    if part in _PARTS and part not in own:
        rule, ours = _PARTS[part]
        # These programs do not wrap a model, so their names have no prefix that could be missing.
        return Reading(layer, (at,), ours, (*(each for each in prefix_rules if each != "bare_names"), rule))
    return Reading(layer, (at,), part, prefix_rules) if part.removesuffix(".weight") in _OWN_PARTS else None


def _joined(name: str, paths: Collection[str]) -> Reading | None:
    found = _JOINED.fullmatch(name)
    if found is None or found["rest"] not in _PARTS:
        return None
    path = next((path for path in paths if path.replace(".", "_") == found["path"]), None)
    rule, part = _PARTS[found["rest"]]
    return None if path is None else Reading(int(found["layer"]), (path,), part, (rule,))


def _megatron(layer: int, rest: str) -> Reading | None:
    for path, ours in _MEGATRON_PATHS.items():
        part = rest.removeprefix(f"{path}.")
        if part in _MEGATRON_PARTS and part != rest:
            fused = {3: ("megatron_qkv",), 2: ("megatron_fc1",)}.get(len(ours), ())
            return Reading(layer, ours, _MEGATRON_PARTS[part], fused or ("megatron",))
    return None
