"""From ``--quantization``, the model's files and the device to what the weights become, before they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from loraplex_common.architectures.registry import model_config
from loraplex_common.log import get_logger
from loraplex_common.stored_forms.registry import quantisation_of

from loraplex_engine.config import ConfigError, EngineConfig
from loraplex_engine.model.weight_form import (
    WeightForm,
    choose_weight_form,
    has_fp8_blocks,
    weights_numerics,
)
from loraplex_engine.model.weights import DTYPES

if TYPE_CHECKING:
    from loraplex_common.base_model import BaseModelInfo
    from loraplex_common.stored_forms.quantisation import Quantisation

_log = get_logger()
MIN_CAPABILITY: Final = (8, 9)
"""The first GPUs with products of e4m3 numbers: Ada, then Hopper."""
BLOCKS_CAPABILITY: Final = 9
"""Major number of the GPUs on which torch multiplies with scales of blocks."""
FP8_STEP: Final = 16
"""Inputs and outputs of such a product are multiples of this."""
SCALE_BYTES: Final = 4
"""A scale in fp32, which each output has."""


class WeightChoice:
    """What the weights of a model become.

    Args:
        config: ``--quantization`` and the model's directory.
        info: Facts of the model.
        device: Where to compute.
        dtype: Name of the compute dtype.
        is_cuda: Whether our kernels compute, and not the torch backend.

    Attributes:
        form: What linear layers inside the decoder become.
        quantisation: How the files store them; None if they are whole.
        numerics: See `weights_numerics`.

    Raises:
        ConfigError: If ``--quantization fp8`` asks for what the backend cannot compute.
    """

    def __init__(
        self, config: EngineConfig, info: BaseModelInfo, device: torch.device, *, dtype: str, is_cuda: bool
    ) -> None:
        self._info, self._dtype = info, dtype
        self.quantisation = quantisation_of(config.model)
        self.form = choose_weight_form(config.quantization, self.quantisation, multiplies_fp8=is_cuda)
        self._why_not: str | None = None
        if self.form is WeightForm.FP8 and is_cuda:
            self._why_not = _why_no_fp8(info, device, self.quantisation, dtype)
        if self._why_not is not None:
            if config.quantization == "fp8":
                raise ConfigError(f"--quantization fp8: {self._why_not}")
            self.form = WeightForm.WHOLE
        self.numerics = weights_numerics(self.form, self.quantisation)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights on the device once they are quantised or unpacked, embedding and lm_head included."""
        itemsize = DTYPES[self._dtype].itemsize
        outside = sum(each.in_features * each.out_features for each in self._info.outside) * itemsize
        layers = [each for layer in self._info.layers for each in layer]
        if self.form is WeightForm.WHOLE:
            return outside + sum(each.in_features * each.out_features for each in layers) * itemsize
        return outside + sum((each.in_features + SCALE_BYTES) * each.out_features for each in layers)

    def tell(self) -> None:
        """Say once what becomes of weights that are stored quantised, or are quantised on load."""
        if self.form is WeightForm.FP8:
            method = self.quantisation.method if self.quantisation else "none"
            _log.info("weights are FP8 (e4m3), activations are quantised per token", quant_method=method)
        elif self.quantisation is not None:
            activations = "; activations are not quantised" if self.quantisation.quantises_activations else ""
            _log.info(
                f"quantised weights are unpacked to {self._dtype}, and take the memory of whole ones{activations}",
                quant_method=self.quantisation.method,
                **({} if self._why_not is None else {"why_not_fp8": self._why_not}),
            )

    @staticmethod
    def tell_error(relative: float | None) -> None:
        """Say what quantising on load has added: the norm of all changes over the norm of all weights."""
        if relative is not None:
            _log.info("weights were quantised to FP8 on load", added_relative_error=round(relative, 4))


def _why_no_fp8(info: BaseModelInfo, device: torch.device, quantisation: Quantisation | None, dtype: str) -> str | None:
    """Return why our kernels cannot compute a model's FP8 products, with the remedy; None if they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"a GPU of compute capability {capability[0]}.{capability[1]} has no FP8 products, they begin with 8.9; use "
            "--quantization none"
        )
    if has_fp8_blocks(quantisation) and capability[0] != BLOCKS_CAPABILITY:
        return (
            "torch multiplies weights with scales of 128x128 blocks on Hopper (9.0) only; use --quantization none, or a "
            "checkpoint with a scale for each channel"
        )
    if dtype != "bfloat16":
        return f"FP8 products write bfloat16, not {dtype}; use --dtype bfloat16"
    for layer in model_config(info.config).layers:
        for each in layer:
            if each.in_features % FP8_STEP or each.out_features % FP8_STEP:
                return (
                    f"{each.path} has {each.in_features} inputs and {each.out_features} outputs, FP8 products take multiples "
                    f"of {FP8_STEP}; use --quantization none"
                )
    return None
