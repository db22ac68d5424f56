"""adapter_config.json as programs other than PEFT write it, turned into PEFT's fields."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.adapter_folder import CONFIG_FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.bounds import MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

_MLX_FIELDS: Final = ("fine_tune_type", "lora_parameters", "lora_layers")
_MLX_PARAMETERS: Final = frozenset({"rank", "scale", "dropout", "keys"})
_SWIFT_TRAINING: Final = ("swift_type", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr")


@dataclass(frozen=True, slots=True)
class ConfigForm:
    """A configuration with PEFT's fields.

    Attributes:
        rules: The rules that made them.
        last_layers: Number of adapted layers, counted from the last one; None if `fields` says it.
    """

    fields: dict[str, Any]
    rules: tuple[str, ...] = ()
    last_layers: int | None = None

    @property
    def is_mlx(self) -> bool:
        """Whether MLX-LM wrote it, whose matrices are transposed."""
        return "mlx_config" in self.rules


def peft_config_data(data: bytes) -> bytes:
    """Return adapter_config.json with PEFT's fields; PEFT's own file, or one that is no JSON object, as it is.

    Raises:
        AdapterCorruptUploadError: If it is no JSON, or a setting of the dialect has the wrong type.
        AdapterIncompatibleError: If a setting of the dialect is not served.
    """
    form = read_config(data)
    return data if form is None or not form.rules else json.dumps(form.fields).encode()


def read_config(data: bytes) -> ConfigForm | None:
    """Return adapter_config.json with PEFT's fields; None if its reader must refuse it.

    Raises:
        AdapterCorruptUploadError: In the cases of `peft_config_data`.
        AdapterIncompatibleError: In the cases of `peft_config_data`.
    """
    if len(data) > MAX_CONFIG_BYTES:
        return None
    fields = parse_json(data, what=CONFIG_FILE, max_values=MAX_CONFIG_VALUES)
    if not isinstance(fields, dict):
        return None
    if fields.get("peft_type") is None and any(name in fields for name in _MLX_FIELDS):
        return _from_mlx(fields)
    if fields.get("swift_type") == "LORA":
        kept = {name: value for name, value in fields.items() if name not in _SWIFT_TRAINING}
        return ConfigForm({"peft_type": "LORA"} | kept, ("swift_config",))
    return ConfigForm(fields)


def _from_mlx(fields: Mapping[str, Any]) -> ConfigForm:
    """Read what MLX-LM's own loader reads; its other settings are those of the training run."""
    kind = fields.get("fine_tune_type") or ("dora" if fields.get("use_dora") else "lora")
    if kind not in ("lora", "dora"):
        raise AdapterIncompatibleError(
            f"{CONFIG_FILE}: fine_tune_type = {str(kind)[:80]!r} is not served; train with lora or dora"
        )
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterCorruptUploadError(f"{CONFIG_FILE}: lora_parameters is no object, as MLX-LM writes it")
    strange = sorted(name for name, value in parameters.items() if name not in _MLX_PARAMETERS and value is not None)
    if strange:
        raise AdapterIncompatibleError(
            f"{CONFIG_FILE}: lora_parameters has {strange[0][:80]!r}, which versions of MLX-LM read differently; leave it out "
            "and write the factor on lora_b lora_a as scale"
        )
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if type(rank) is not int or rank < 1:
        raise AdapterCorruptUploadError(f"{CONFIG_FILE}: rank of lora_parameters is no rank")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise AdapterCorruptUploadError(f"{CONFIG_FILE}: scale of lora_parameters is no number")
    layers = fields.get("num_layers", fields.get("lora_layers", -1))
    if type(layers) is not int:
        raise AdapterCorruptUploadError(f"{CONFIG_FILE}: num_layers is no number of layers")
    peft = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": parameters.get("keys"),
        "use_dora": kind == "dora",
        "base_model_name_or_path": fields.get("model"),
    }
    return ConfigForm(peft, ("mlx_config",), layers)
