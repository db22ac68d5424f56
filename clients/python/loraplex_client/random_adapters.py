"""Random LoRA adapters of a base model as PEFT directories, for load tests: written with numpy alone."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_common.bfloat16 import to_bfloat16
from loraplex_common.directories import model_directory_problem
from loraplex_common.projections import LayerProjections, gated_decoder_layer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
STRENGTH: Final = 0.02
"""Standard deviation of B: answers differ from the base model's, and stay text."""

_ENCODERS: Final[dict[str, tuple[str, Callable[[NDArray[np.float32]], NDArray[Any]]]]] = {
    "bfloat16": ("BF16", to_bfloat16),
    "float16": ("F16", lambda values: values.astype(np.float16)),
    "float32": ("F32", lambda values: values),
}
DTYPES: Final = tuple(_ENCODERS)


class RandomAdapterError(ValueError):
    """No such adapters can be made; the message names the option or file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomAdapters:
    """A family of adapters: number i has the (i mod n)-th rank, and always the same weights.

    Attributes:
        layers: What each layer of the base model offers to adapters.
        base_model: Name of the base model, written into each ``adapter_config.json``.
        targets: Names of the adapted projections, where a layer has them.
        dtype: One of `DTYPES`.
    """

    layers: tuple[LayerProjections, ...]
    base_model: str
    targets: tuple[str, ...]
    ranks: tuple[int, ...] = (8,)
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RandomAdapterError(f"--dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not self.ranks or min(self.ranks) < 1:
            raise RandomAdapterError("--ranks must be numbers above 0")

    def rank_of(self, number: int) -> int:
        """Return an adapter's rank."""
        return self.ranks[number % len(self.ranks)]

    def write(self, number: int, directory: Path) -> None:
        """Write one adapter as a PEFT directory, which is created."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "lora_alpha": 2 * self.rank_of(number),
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank_of(number),
            "target_modules": list(self.targets),
            "task_type": "CAUSAL_LM",
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_safetensors(directory / "adapter_model.safetensors", self._tensors(number), self.dtype)

    def _tensors(self, number: int) -> dict[str, NDArray[np.float32]]:
        """Return A ``[rank, inputs]`` and B ``[outputs, rank]`` of every adapted projection under PEFT's names."""
        generator = np.random.default_rng([self.seed, number])
        rank = self.rank_of(number)
        tensors: dict[str, NDArray[np.float32]] = {}
        for layer, offered in enumerate(self.layers):
            by_name = {projection.name: projection for projection in offered}
            for projection in (by_name[name] for name in self.targets if name in by_name):
                prefix = f"base_model.model.model.layers.{layer}.{projection.path}"
                inputs, outputs = projection.shape
                a = generator.standard_normal((rank, inputs), dtype=np.float32) / np.float32(math.sqrt(inputs))
                b = generator.standard_normal((outputs, rank), dtype=np.float32) * np.float32(STRENGTH)
                tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        return tensors


def read_targets(text: str, layers: tuple[LayerProjections, ...]) -> tuple[str, ...]:
    """Return the projections of ``all``, ``qkvo`` or a list such as ``q_proj,v_proj``.

    Raises:
        RandomAdapterError: If one is none.
    """
    offered = tuple(dict.fromkeys(projection.name for layer in layers for projection in layer))
    names = {"all": offered, "qkvo": ATTENTION}.get(text) or tuple(text.split(","))
    if unknown := [name for name in names if name not in offered]:
        raise RandomAdapterError(f"--targets {unknown[0]!r} is not all, qkvo or some of {', '.join(offered)}")
    return tuple(dict.fromkeys(names))


def read_layers(model: Path) -> tuple[LayerProjections, ...]:
    """Return what each layer of a base model offers to adapters, from its directory's ``config.json``.

    Raises:
        RandomAdapterError: If there is none, or it lacks a shape.
    """
    if problem := model_directory_problem(model):
        raise RandomAdapterError(f"--model {problem}")
    path = model / "config.json"
    try:
        config = json.loads(path.read_text())
        num_heads = int(config["num_attention_heads"])
        layer = gated_decoder_layer(
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // num_heads),
        )
        return (layer,) * int(config["num_hidden_layers"])
    except OSError as error:
        raise RandomAdapterError(f"{path}: {error.strerror}") from error
    except KeyError as error:
        raise RandomAdapterError(f"{path}: {error.args[0]} is missing") from error
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise RandomAdapterError(f"{path}: {error}") from error


def write_safetensors(path: Path, tensors: dict[str, NDArray[np.float32]], dtype: str) -> None:
    """Write tensors rounded to one of `DTYPES` as a safetensors file."""
    name_of_dtype, encode = _ENCODERS[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, values in tensors.items():
        encoded = np.ascontiguousarray(encode(values)).tobytes()
        header[name] = {
            "dtype": name_of_dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(encoded)],
        }
        data += encoded
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
