"""Entries of config.json that several architectures read alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from loraplex_common.config_values import ConfigValues

Windows: TypeAlias = tuple[int | None, ...]
"""Per layer, how many of the last tokens it attends to; None is all."""

MAX_LAYERS: Final = 4096
"""More decoder layers than any dense model has."""
ROPE_NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""Served RoPE types, and the numbers that each cannot do without."""
ROPE_OPTIONS: Final = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""Numbers of yarn that may be absent or null."""
ROPE_MSCALES: Final = ("mscale", "mscale_all_dim")
"""Those of them of which 0 means that they are absent."""
DEFAULT_ROPE_THETA: Final = 10000.0
SLIDING, FULL = "sliding_attention", "full_attention"


def num_hidden_layers(values: ConfigValues) -> int:
    """Return the decoder layers: of more than `MAX_LAYERS`, reading them would take all memory before a weight is missed."""
    return values.integer("num_hidden_layers", most=MAX_LAYERS)


def num_kv_heads(values: ConfigValues, num_heads: int) -> int:
    """Return the key and value heads; as many as query heads for an absent key and for null.

    Raises:
        BaseModelError: If they do not divide the query heads.
    """
    num = values.integer("num_key_value_heads") if values.has("num_key_value_heads") else num_heads
    if num_heads % num:
        raise values.wrong("num_key_value_heads", f"expected a divisor of num_attention_heads = {num_heads}")
    return num


def head_dim(values: ConfigValues, num_heads: int) -> int:
    """Return the size of a head: ``hidden_size`` over the heads for an absent key and for null.

    Raises:
        BaseModelError: If it is odd: RoPE rotates pairs.
    """
    if not values.has("head_dim"):
        hidden_size = values.integer("hidden_size")
        if hidden_size % num_heads or hidden_size // num_heads % 2:
            raise values.wrong("head_dim", f"hidden_size {hidden_size} over {num_heads} heads is no even number")
        return hidden_size // num_heads
    dim = values.integer("head_dim")
    if dim % 2:
        raise values.wrong("head_dim", "expected an even number")
    return dim


def sliding_window(values: ConfigValues) -> int | None:
    """Return the window: 4096, what transformers assumes, if the key is absent; none for null."""
    if values.has("sliding_window"):
        return values.integer("sliding_window")
    return 4096 if values.is_absent("sliding_window") else None


def no_windows(values: ConfigValues, num_layers: int) -> Windows:
    """Return the windows of an architecture in which every layer attends to all tokens, whatever ``sliding_window`` is.

    Raises:
        BaseModelError: If ``layer_types`` says otherwise of a layer.
    """
    layer_types = values.texts("layer_types")
    if layer_types and set(layer_types) != {FULL}:
        raise values.unserved("layer_types", f"only {FULL} is")
    values.without_effect("sliding_window", "use_sliding_window", "max_window_layers")
    return (None,) * num_layers


def windows_by_layer(values: ConfigValues, num_layers: int) -> Windows:
    """Return the windows that ``use_sliding_window``, ``max_window_layers`` and ``layer_types`` give each layer (Qwen).

    Raises:
        BaseModelError: If ``layer_types`` does not say one or the other of each layer.
    """
    layer_types = values.texts("layer_types")
    values.without_effect("sliding_window", "max_window_layers")  # where use_sliding_window is false
    if not values.flag("use_sliding_window") or (window := sliding_window(values)) is None:
        return (None,) * num_layers
    if layer_types is None:
        first = values.integer("max_window_layers", 28, least=0)
        layer_types = [SLIDING if layer >= first else FULL for layer in range(num_layers)]
    if set(layer_types) - {SLIDING, FULL} or len(layer_types) != num_layers:
        raise values.wrong("layer_types", f"expected {num_layers} of {SLIDING} and {FULL}")
    return tuple(window if kind == SLIDING else None for kind in layer_types)


def windows_of_types(values: ConfigValues, num_layers: int, default: Callable[[int], str]) -> Windows:
    """Return the windows that ``layer_types`` gives each layer.

    Args:
        values: Entries of config.json.
        num_layers: Decoder layers.
        default: Returns the type of a layer, by its number, for an absent ``layer_types``.

    Raises:
        BaseModelError: If ``layer_types`` does not say one or the other of each layer, or there is no window.
    """
    layer_types = values.texts("layer_types") or [default(layer) for layer in range(num_layers)]
    if set(layer_types) - {SLIDING, FULL} or len(layer_types) != num_layers:
        raise values.wrong("layer_types", f"expected {num_layers} of {SLIDING} and {FULL}")
    window = values.integer("sliding_window", 4096)
    return tuple(window if kind == SLIDING else None for kind in layer_types)


def rope_parameters(
    values: ConfigValues,
    max_positions: int,
    default_theta: float = DEFAULT_ROPE_THETA,
    *,
    is_partial: bool = False,
    kinds: Mapping[str, tuple[str, ...]] = ROPE_NEEDS,
) -> dict[str, Any]:
    """Return RoPE parameters from either spelling of config.json.

    transformers 5 writes one ``rope_parameters``; before, there were ``rope_theta`` and ``rope_scaling`` with ``type``
    or ``rope_type``.

    Args:
        values: Entries of config.json.
        max_positions: Longest sequence the model was trained for, in tokens.
        default_theta: What an absent ``rope_theta`` means.
        is_partial: Whether the architecture may rotate a part of each head only; see `rotary_dim`.
        kinds: Its RoPE types, and the numbers that each cannot do without.

    Raises:
        BaseModelError: If the type is not served, or lacks a number.
    """
    values.without_effect("rope_theta", "rope_scaling")
    rope = rope_section(values)
    for owner in () if is_partial else (rope, values):
        if owner.has("partial_rotary_factor") and owner.number("partial_rotary_factor") != 1.0:
            raise owner.unserved("partial_rotary_factor", "only 1.0 is")
    theta = rope if rope.has("rope_theta") else values
    return read_rope(rope, theta.number("rope_theta", default_theta, above=1.0), max_positions, kinds)


def read_rope(
    rope: ConfigValues, theta: float, max_positions: int, kinds: Mapping[str, tuple[str, ...]] = ROPE_NEEDS
) -> dict[str, Any]:
    """Return RoPE parameters from one object of config.json; see `rope_parameters`.

    Args:
        rope: Its entries.
        theta: The wavelengths' base.
        max_positions: What an absent trained length means.
        kinds: As there.
    """
    rope.without_effect("type", *ROPE_OPTIONS, *(key for needs in kinds.values() for key in needs))
    kind = rope.text("rope_type" if rope.has("rope_type") else "type", "default")
    if kind not in kinds:
        raise rope.problem(f"RoPE type {kind!r} is not one of {', '.join(kinds)}")
    if nested := rope.nested():
        raise rope.problem(f"RoPE parameters per layer type ({', '.join(nested)}) are not served")
    length = "original_max_position_embeddings"
    read: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": theta,
        length: rope.integer(length) if rope.has(length) else max_positions,
        "truncate": rope.flag("truncate", default=True),
    }
    read |= {key: rope.number(key) for key in kinds[kind]}
    for key in ROPE_OPTIONS if kind == "yarn" else ():
        if rope.has(key) and not (key in ROPE_MSCALES and rope.raw(key) == 0):
            read[key] = rope.number(key)
    if kind == "llama3" and read["high_freq_factor"] <= read["low_freq_factor"]:
        raise rope.wrong("high_freq_factor", "expected more than low_freq_factor")
    return read


def rotary_dim(values: ConfigValues, head_dim: int, default: float) -> int:
    """Return how many of a head's dimensions RoPE rotates, from ``partial_rotary_factor`` in either place.

    Args:
        values: Entries of config.json.
        head_dim: Size of a head.
        default: What an absent factor means.

    Raises:
        BaseModelError: If it is no even number of dimensions, or more than the head has, or the two places differ.
    """
    key = "partial_rotary_factor"
    owners = [owner for owner in (rope_section(values), values) if owner.has(key)]
    factors = [owner.number(key) for owner in owners]
    if len(set(factors)) > 1:
        raise values.wrong(key, "expected no other one beside that of rope_parameters")
    dim = int(head_dim * (factors[0] if factors else default))
    if dim % 2 or not 0 < dim <= head_dim:
        raise (owners or [values])[0].wrong(key, f"expected an even part of a head of {head_dim} dimensions, not {dim}")
    return dim


def rope_section(values: ConfigValues) -> ConfigValues:
    """Return the entries of either spelling; none if both are absent.

    Raises:
        BaseModelError: If both are there and differ.
    """
    spelled = [section for key in ("rope_parameters", "rope_scaling") if (section := values.section(key))]
    if len(spelled) > 1 and not spelled[1].equals(spelled[0]):
        raise values.wrong("rope_scaling", "expected no other one beside rope_parameters")
    return spelled[0] if spelled else values.empty()
