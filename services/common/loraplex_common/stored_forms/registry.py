"""``quant_method`` -> how it is read. A new stored form is a file beside this one, a line here, and one in the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from loraplex_common.config_values import BaseModelError, ConfigValues, parse_json
from loraplex_common.stored_forms import awq, bitsandbytes, compressed_tensors, fp8, gptq
from loraplex_common.stored_forms.quantisation import SERVE_INSTEAD, Quantisation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MethodReader: TypeAlias = Callable[[ConfigValues], Quantisation]
"""Reads the entries of ``quantization_config``; raises `BaseModelError` that names what is not served."""

METHODS: Final[dict[str, MethodReader]] = {
    "fp8": fp8.read,
    "compressed-tensors": compressed_tensors.read,
    "gptq": gptq.read,
    "awq": awq.read,
    "bitsandbytes": bitsandbytes.read,
}
"""By ``quant_method``."""
QUANTISATION_KEYS: Final = ("quantization_config", "compression_config")


def read_quantisation(config: Mapping[str, Any], file: str = "config.json") -> Quantisation | None:
    """Read how a checkpoint stores its weights; None if they are whole.

    Args:
        config: config.json as read.
        file: Named in messages.

    Raises:
        BaseModelError: If they are stored in a form that is not served, or an entry is of the wrong type; the message
            names it.
    """
    found = [key for key in QUANTISATION_KEYS if config.get(key) is not None]
    if not found:
        return None
    key = found[0]
    if any(config[other] != config[key] for other in found):
        raise BaseModelError(
            f"{file}: {' and '.join(found)} say different things of one checkpoint; remove the entry that the weights do not "
            "follow"
        )
    values = ConfigValues(config, file).section(key)
    method = values.text("quant_method", "") if values else ""
    if values is None or method not in METHODS:
        raise BaseModelError(
            f"{file}: {key}{f' ({method})' if method else ''}: quantised weights are not served in this form; served: "
            f"{', '.join(METHODS)}; {SERVE_INSTEAD}, or remove the entry if the weights are whole"
        )
    return METHODS[method](values)


def quantisation_of(directory: Path) -> Quantisation | None:
    """Read how the checkpoint of a directory stores its weights; None if they are whole or config.json cannot be read.

    Raises:
        BaseModelError: In the cases of `read_quantisation`.
    """
    path = directory / "config.json"
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # `check_base_model` says so
        return None
    return read_quantisation(config, str(path)) if isinstance(config, dict) else None
