"""The text part of a multimodal model: its entries of config.json, and its tensors among those of the files.

What stands here is the decoder by itself, as if it had been saved alone: other modules see its config.json and its tensors under
the names of its own architecture. The encoders of images are neither read nor served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_common.config_values import BaseModelError, ConfigValues, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

MULTIMODAL: Final[Mapping[str, Mapping[str, str]]] = {
    "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
}
"""Architecture -> ``model_type`` of its ``text_config`` -> the text part's architecture; an absent type means the first."""
TEXT_CONFIG: Final = "text_config"
ABOUT_IMAGES: Final = (
    *("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "image_token_id", "boi_token_id"),
    *("eoi_token_id", "mm_tokens_per_image", "multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size"),
    "vision_feature_layer",
)
"""Keys beside ``text_config`` that say nothing about text."""
OF_THE_WHOLE: Final = ("quantization_config", "compression_config", "_name_or_path")
"""Keys beside ``text_config`` that are about the text part as well."""
PREFIXES: Final = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""What tensors of a text part begin with in the files (as transformers writes them, and as it has them in memory), and alone."""
OTHER_PARTS: Final = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""What tensors of other parts begin with."""


def multimodal_architecture(config: Mapping[str, Any]) -> str | None:
    """Return the multimodal architecture of a config.json whose text part can be served; None if it has none."""
    named = config.get("architectures")
    names = named if isinstance(named, list) else []
    return next((name for name in names if isinstance(name, str) and name in MULTIMODAL), None)


def is_multimodal(directory: Path) -> bool:
    """Tell whether a directory's config.json is a multimodal model's; not if it cannot be read."""
    try:
        config = parse_json((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # `check_base_model` says so
        return False
    return isinstance(config, dict) and multimodal_architecture(config) is not None


def text_part(config: Mapping[str, Any], file: str = "config.json") -> tuple[dict[str, Any], ConfigValues]:
    """Return the config.json that a multimodal model's text part would have alone, and the entries around it.

    Args:
        config: config.json as read, of an architecture in `MULTIMODAL`.
        file: Named in messages.

    Raises:
        BaseModelError: If it has no text part, or one that is not served.
    """
    architecture = multimodal_architecture(config)
    assert architecture is not None, "only of such a model"
    inner = ConfigValues(config, file).section(TEXT_CONFIG)
    if inner is None:
        raise ConfigValues(config, file).wrong(TEXT_CONFIG, "expected an object")
    around = ConfigValues({key: value for key, value in config.items() if key != TEXT_CONFIG}, file)
    parts = MULTIMODAL[architecture]
    kind = inner.text("model_type", next(iter(parts)))
    if kind not in parts:
        raise inner.unserved(
            "model_type", f"only {' and '.join(parts)} {'is' if len(parts) == 1 else 'are'} in {architecture}"
        )
    if inner.has("final_logit_softcapping"):
        raise inner.unserved(
            "final_logit_softcapping", f"{architecture} has no cap, and its text part alone would have one"
        )
    around.without_effect("tie_word_embeddings", *ABOUT_IMAGES, *OF_THE_WHOLE)
    whole = {key: config[key] for key in OF_THE_WHOLE if key in config}
    owner = around if around.has("tie_word_embeddings") else inner
    own = {"architectures": [parts[kind]], "tie_word_embeddings": owner.flag("tie_word_embeddings", default=True)}
    return {**config[TEXT_CONFIG], **whole, **own}, around


def text_names(names: Iterable[str]) -> dict[str, str | None]:
    """Return what the text part alone would call tensors; None for those of other parts.

    Args:
        names: All tensors of a multimodal model.

    Raises:
        BaseModelError: If two tensors would have one name.
    """
    found: dict[str, str | None] = {}
    origins: dict[str, str] = {}
    for name in names:
        own = None if name.startswith(OTHER_PARTS) else _text_name(name)
        if own is not None and (other := origins.setdefault(own, name)) != name:
            raise BaseModelError(
                f"{other} and {name} are both {own} of the text part; remove the one that does not belong"
            )
        found[name] = own
    return found


def _text_name(name: str) -> str:
    prefix = next((each for each in PREFIXES if name.startswith(each)), "")
    return PREFIXES.get(prefix, "") + name.removeprefix(prefix)
