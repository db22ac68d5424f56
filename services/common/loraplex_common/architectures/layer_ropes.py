"""RoPE parameters by the type of a layer: local layers (with a window) and global ones have their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from loraplex_common.architectures.entries import FULL, SLIDING, read_rope, rope_section

if TYPE_CHECKING:
    from loraplex_common.architectures.entries import Windows
    from loraplex_common.config_values import ConfigValues

Ropes: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
"""RoPE parameters of layers that attend to all tokens, then of those with a window."""


def ropes_by_type(
    values: ConfigValues, max_positions: int, *, theta: float, local_theta: float | None, local_key: str | None
) -> Ropes:
    """Return RoPE parameters from either spelling of config.json.

    transformers 5 writes ``rope_parameters`` with an object for each type of layer; before, ``rope_scaling`` and ``rope_theta``
    were those of global layers, and local ones had the default type.

    Args:
        values: Entries of config.json.
        max_positions: Longest sequence the model was trained for, in tokens.
        theta: What an absent ``rope_theta`` of global layers means.
        local_theta: Likewise, of local layers; None if it is that of global ones.
        local_key: Key of local layers' theta in the older spelling; None if there is none.

    Raises:
        BaseModelError: If the spellings are mixed, or a type is not served or lacks a number.
    """
    values.without_effect("rope_theta", "rope_scaling", *([local_key] if local_key else []))
    full, local = _sections(values)
    global_theta = (full if full.has("rope_theta") else values).number("rope_theta", theta, above=1.0)
    owner, key = (local, "rope_theta") if local.has("rope_theta") else (values, local_key or "rope_theta")
    own_theta = owner.number(key, global_theta if local_theta is None else local_theta, above=1.0)
    for section in (full, local):
        if section.has("partial_rotary_factor") and section.number("partial_rotary_factor") != 1.0:
            raise section.unserved("partial_rotary_factor", "only 1.0 is")
    return read_rope(full, global_theta, max_positions), read_rope(local, own_theta, max_positions)


def _sections(values: ConfigValues) -> tuple[ConfigValues, ConfigValues]:
    """Return the entries of global layers and of local ones."""
    both = values.section("rope_parameters")
    if both is None:
        return rope_section(values), values.empty()
    full, local = both.section(FULL), both.section(SLIDING)
    if full is None and local is None:
        raise values.wrong("rope_parameters", f"expected an object with {FULL} and {SLIDING}")
    if values.has("rope_scaling"):
        raise values.wrong("rope_scaling", "expected none beside rope_parameters of each type of layer")
    return full or values.empty(), local or values.empty()


def rope_of_layer(windows: Windows) -> tuple[int, ...]:
    """Return which of `Ropes` each layer has."""
    return tuple(0 if window is None else 1 for window in windows)
