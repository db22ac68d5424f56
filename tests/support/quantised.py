"""Writes quantised checkpoints of a whole one, by compressed-tensors' own packer or from each format's definition.

Each function here takes a weight ``[outputs, inputs]`` and returns the tensors that the format stores, and the weight that they
stand for in fp32. Nothing of the engine is used.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Pack = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each four bits of a word hold, the lowest first."""


def scales_and_zeros(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Return scales in fp32 and zeros in int8 from the least and the largest number of each block."""
    outputs, inputs = weight.shape
    if args.strategy == "tensor":
        blocks = weight.reshape(1, 1, -1)
    elif args.strategy == "channel":
        blocks = weight.reshape(outputs, 1, -1)
    elif args.strategy == "group":
        assert args.group_size
        blocks = weight.reshape(outputs, inputs // args.group_size, args.group_size)
    else:
        assert args.block_structure
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -inputs % wide, 0, -outputs % high))
        blocks = padded.reshape(padded.shape[0] // high, high, -1, wide).transpose(1, 2).flatten(2)
    half = 448.0 if args.type == "float" else float((1 << (args.num_bits - 1)) - 1)
    if args.symmetric:
        scale = blocks.abs().amax(-1) / half
        return scale, torch.zeros(scale.shape, dtype=torch.int8)
    scale = (blocks.amax(-1) - blocks.amin(-1)) / (2 * half + 1)
    zero = (-half - 1 - blocks.amin(-1) / scale).round().clamp(-half - 1, half)
    return scale, zero.to(torch.int8)


def compressed_tensors(stored_as: str, scale_dtype: torch.dtype = torch.float32, **args: Any) -> Pack:
    """Return what packs as the library compressed-tensors does."""
    weights = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(stored_as)

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale, zero = scales_and_zeros(weight, weights)
        scale = (scale.reshape(1) if weights.strategy == "tensor" else scale).to(scale_dtype)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        packed = compressor.compress(state, scheme)
        whole = compressor.decompress(packed | {"weight_scale": scale.float()}, scheme)["weight"]
        return packed, whole.float()

    return pack


def fp8(block: tuple[int, int] | None, scale_name: str, *, activation: str | None = None) -> Pack:
    """Return what packs as ``fp8`` is defined: e4m3 numbers, times the scale of their block or of the tensor."""
    strategy = "tensor" if block is None else "block"
    args = QuantizationArgs(type="float", strategy=strategy, block_structure=list(block) if block else None)

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale, _ = scales_and_zeros(weight, args)
        high, wide = block or tuple(weight.shape)
        each = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: weight.shape[0], : weight.shape[1]]
        numbers = (weight / each).to(torch.float8_e4m3fn)
        packed = {"weight": numbers, scale_name: scale if block else scale.reshape(())}
        if activation:
            packed[activation] = torch.tensor(0.5)
        return packed, numbers.float() * each

    return pack


def _rounded(weight: Tensor, bits: int, group_of_input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers ``[inputs, outputs]``, and zeros and fp16 scales ``[groups, outputs]``, as GPTQ and AWQ have them."""
    top, columns = (1 << bits) - 1, weight.t()
    groups = [columns[group_of_input == group] for group in range(int(group_of_input.max()) + 1)]
    least = torch.stack([group.amin(0).clamp(max=0) for group in groups])
    most = torch.stack([group.amax(0).clamp(min=0) for group in groups])
    scales = ((most - least) / top).half()
    zeros = (-least / scales.float()).round().clamp(0, top).to(torch.int64)
    zeros[0, 0] = 0  # the case whose stored value wraps around
    numbers = (columns / scales.float()[group_of_input] + zeros[group_of_input]).round().clamp(0, top).to(torch.int64)
    return numbers, zeros, scales


def _or_bits(parts: list[Tensor], bits: int) -> Tensor:
    """Return int32 words whose lowest bits are the first part's."""
    word = sum((part << (bits * place) for place, part in enumerate(parts)), torch.zeros_like(parts[0]))
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def gptq(bits: int, group_size: int, *, shuffled: bool = False, zero_offset: int = 1, index: bool = True) -> Pack:
    """Return what packs as AutoGPTQ's ``QuantLinear`` lays it out."""
    per_word, top = 32 // bits, (1 << bits) - 1

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        outputs, inputs = weight.shape
        order = torch.arange(inputs) // (inputs if group_size == -1 else group_size)
        group = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))] if shuffled else order
        numbers, zeros, scales = _rounded(weight, bits, group)
        stored = (zeros - zero_offset) & top
        packed = {
            "qweight": _or_bits([numbers[place::per_word] for place in range(per_word)], bits),
            "qzeros": _or_bits([stored[:, place::per_word] for place in range(per_word)], bits),
            "scales": scales,
            "bias": torch.zeros(outputs, dtype=torch.float16),
        }
        if index:
            packed["g_idx"] = group.to(torch.int32)
        return packed, ((numbers - zeros[group]) * scales.float()[group]).t()

    return pack


def awq(group_size: int) -> Pack:
    """Return what packs as AutoAWQ's ``WQLinear_GEMM`` lays it out."""

    def words(values: Tensor) -> Tensor:
        return _or_bits([values[:, column::8] for column in AWQ_ORDER], 4)

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        group = torch.arange(weight.shape[1]) // group_size
        numbers, zeros, scales = _rounded(weight, 4, group)
        packed = {"qweight": words(numbers), "qzeros": words(zeros), "scales": scales}
        return packed, ((numbers - zeros[group]) * scales.float()[group]).t()

    return pack


def bnb_4bit(kind: str, *, is_nested: bool, block: int = 64) -> Pack:
    """Return what packs as bitsandbytes' ``Params4bit`` does."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # a machine with a GPU may lack it

        codes, state = quantize_4bit(weight, blocksize=block, compress_statistics=is_nested, quant_type=kind)
        parts = {f"weight.{suffix}": part for suffix, part in state.as_dict(packed=True).items()}
        # Blocks run over the flattened weight; the library's CPU kernel, unlike its others, begins one with each row.
        state.shape = torch.Size((weight.numel() // block, block))
        return {"weight": codes, **parts}, dequantize_4bit(codes, state).float().view(weight.shape)

    return pack


def bnb_int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Pack as bitsandbytes' ``Int8Params`` does."""
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, largest, _ = int8_vectorwise_quant(weight.half())
    packed = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return packed, int8_vectorwise_dequant(codes, largest)


def mxfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Pack as compressed-tensors' ``MXFP4PackedCompressor`` does."""
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    largest = weight.reshape(weight.shape[0], -1, 32).abs().amax(-1)
    scale = torch.exp2((largest / 6).log2().ceil())
    packed = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    return packed, compressor.decompress(packed, scheme)["weight"].float()


def write_quantised(
    whole: Path, quantised: Path, pack: Pack, settings: dict[str, Any], *, kept: tuple[str, ...] = ()
) -> Path:
    """Write a quantised copy of a checkpoint, and put the weights that it stands for into the whole one, in fp32.

    Args:
        whole: A checkpoint in one or several files.
        quantised: Directory to write to, with files of the same names.
        pack: Packs the weight of one linear layer inside the decoder.
        settings: ``quantization_config``.
        kept: Endings of the names of modules that stay whole.

    Returns:
        ``quantised``.
    """
    shutil.copytree(whole, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    weight_map: dict[str, str] = {}
    for file in sorted(whole.glob("*.safetensors")):
        tensors = load_file(file)
        packed: dict[str, Tensor] = {}
        for name, tensor in list(tensors.items()):
            module = name.removesuffix(".weight")
            if not name.endswith("_proj.weight") or module.endswith(kept or "-"):
                packed[name] = tensor
                continue
            parts, tensors[name] = pack(tensor.float())
            packed |= {f"{module}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, file)
        save_file(packed, quantised / file.name)
        weight_map |= dict.fromkeys(packed, file.name)
    index = quantised / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return quantised
