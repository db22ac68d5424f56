"""What loading makes of a model's weights: what ``--quantization`` asks for, what the files store, what the device computes."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from loraplex_common.numerics import WHOLE

if TYPE_CHECKING:
    from loraplex_common.stored_forms.quantisation import Quantisation, StoredForm

FP8_BLOCK: Final = 128
"""Outputs and inputs that share a scale where scales belong to blocks, and inputs that share one of an activation."""
FP8_FORM: Final = "scaled_float8"
"""`StoredForm.name` of numbers in e4m3."""
FP8_SCALES: Final = ((None, None), (1, None), (FP8_BLOCK, FP8_BLOCK))
"""Values of `StoredForm.block` that products of e4m3 numbers take: a scale for a tensor, for an output, for a block."""


class WeightForm(StrEnum):
    """What the weights of linear layers inside the decoder are on the device; lm_head and the embedding are whole."""

    WHOLE = "whole"
    """In the compute dtype: as stored, or unpacked."""
    FP8 = "fp8"
    """In e4m3 with scales, multiplied with activations that are quantised per token: as stored, or quantised on load."""


def choose_weight_form(asked: str, quantisation: Quantisation | None, *, multiplies_fp8: bool) -> WeightForm:
    """Return what the weights should become.

    Args:
        asked: ``--quantization``, see `EngineConfig`: ``auto`` keeps FP8 where the backend multiplies it and the checkpoint is meant for it.
        quantisation: How the files store the weights; None if they are whole.
        multiplies_fp8: Whether the backend has products of e4m3 numbers that are faster than those of whole weights.
    """
    if asked == "fp8" or (asked == "auto" and multiplies_fp8 and is_fp8_checkpoint(quantisation)):
        return WeightForm.FP8
    return WeightForm.WHOLE


def is_fp8_checkpoint(quantisation: Quantisation | None) -> bool:
    """Tell whether a checkpoint stores e4m3 numbers that products take as they are, and quantises activations, too."""
    return (
        quantisation is not None
        and quantisation.quantises_activations
        and all(keeps_fp8(group.form) for group in quantisation.groups)
    )


def keeps_fp8(form: StoredForm) -> bool:
    """Tell whether products take a stored weight's numbers and scales as they are."""
    return form.name == FP8_FORM and form.block in FP8_SCALES and not form.is_reordered and not form.has_zero_points


def has_fp8_blocks(quantisation: Quantisation | None) -> bool:
    """Tell whether a checkpoint has e4m3 numbers with scales of blocks."""
    return quantisation is not None and any(
        keeps_fp8(group.form) and group.form.block == (FP8_BLOCK, FP8_BLOCK) for group in quantisation.groups
    )


def weights_numerics(form: WeightForm, quantisation: Quantisation | None) -> str:
    """Return what loading does to the weights, in short: two engines of one checkpoint that agree in it have equal weights.

    Args:
        form: What they become.
        quantisation: How the files store them; None if they are whole.

    Returns:
        `Numerics.weights`: ``whole``, ``unpacked:awq`` for unpacked ones by their method, ``fp8-w8a8-dynamic`` for
        e4m3 with activations that are quantised per token.
    """
    if form is WeightForm.FP8:
        return "fp8-w8a8-dynamic"
    return WHOLE if quantisation is None else f"unpacked:{quantisation.method}"
