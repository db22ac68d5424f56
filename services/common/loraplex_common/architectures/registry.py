"""Architecture name -> how its config.json is read. A new architecture is a file beside this one and a line here.

What `ModelConfig` cannot say of it (another order of norms, another MLP) is a decoder of its own in the engine:
`loraplex_engine.model.registry`. Every service reads a model through `model_config`, so that what cannot be served is
refused before any of them starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from loraplex_common.architectures import (
    gemma2,
    gemma3,
    glm4,
    granite,
    granite4,
    llama,
    ministral3,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
)
from loraplex_common.architectures.text_part import MULTIMODAL, TEXT_CONFIG, multimodal_architecture, text_part
from loraplex_common.architectures.unread import refuse_unread
from loraplex_common.config_values import BaseModelError, ConfigValues
from loraplex_common.decoder_config import ModelConfig
from loraplex_common.stored_forms.registry import read_quantisation

if TYPE_CHECKING:
    from collections.abc import Mapping

ConfigReader: TypeAlias = Callable[[ConfigValues], ModelConfig]
"""Reads the entries of config.json; raises `BaseModelError` that names what is not served."""

ARCHITECTURES: Final[dict[str, ConfigReader]] = {
    "LlamaForCausalLM": llama.read,
    "MistralForCausalLM": mistral.read,
    "Qwen2ForCausalLM": qwen2.read,
    "Qwen3ForCausalLM": qwen3.read,
    "GraniteForCausalLM": granite.read,
    "Olmo2ForCausalLM": olmo2.read,
    "SmolLM3ForCausalLM": smollm3.read,
    "SeedOssForCausalLM": seed_oss.read,
    "Glm4ForCausalLM": glm4.read,
    "Phi3ForCausalLM": phi3.read,
    "Gemma2ForCausalLM": gemma2.read,
    "Gemma3ForCausalLM": gemma3.read,
    "Olmo3ForCausalLM": olmo3.read,
    "Ministral3ForCausalLM": ministral3.read,
    "GraniteMoeHybridForCausalLM": granite4.read,
}
"""By the name that ``architectures`` in config.json has."""


def model_config(config: Mapping[str, Any], file: str = "config.json", *, text_only: bool = False) -> ModelConfig:
    """Read a model's architecture out of its config.json.

    Args:
        config: config.json as read.
        file: Named in messages.
        text_only: Whether a multimodal model means its text part.

    Raises:
        BaseModelError: If no architecture of it is served, its weights are stored in a form that is not, it asks for something
            that is not computed or is not understood, or an entry is missing, null or of the wrong type; the message names it.
    """
    multimodal, prefix = multimodal_architecture(config), ""
    if multimodal is not None:
        if not text_only:
            raise BaseModelError(
                f"{file}: {multimodal} takes images, which are not served; with --text-only its text part is, as a model of text"
            )
        (config, around), prefix = text_part(config, file), f"{TEXT_CONFIG}."
        refuse_unread(around)
    read = ARCHITECTURES[_architecture(config, file)]
    read_quantisation(config, file)
    values = ConfigValues(config, file, prefix)
    model = read(values)
    refuse_unread(values)
    return model


def served_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of what is served: of a multimodal model, the one that its text part would have alone."""
    return dict(config) if multimodal_architecture(config) is None else text_part(config)[0]


def _architecture(config: Mapping[str, Any], file: str) -> str:
    named = config.get("architectures")
    names = named if isinstance(named, list) else []
    served = [name for name in names if isinstance(name, str) and name in ARCHITECTURES]
    if not served:
        known = ", ".join((*ARCHITECTURES, *(f"{name} (--text-only)" for name in MULTIMODAL)))
        raise BaseModelError(f"{file}: architecture {named} is not one of {known}; serve a model of one of these")
    return served[0]
