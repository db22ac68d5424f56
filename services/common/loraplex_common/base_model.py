"""What the services must agree on about a base model: its shape, its names, its fingerprint.

Reads a directory in Hugging Face layout (config.json, tokenizer.json, *.safetensors headers) without torch.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.adapter_image import Geometry
from loraplex_common.directories import model_directory_problem

if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURES: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MAX_HEADER_BYTES: Final = 100 * 1024 * 1024
# Keys of config.json that say nothing about what the model computes.
VOLATILE_KEYS: Final = frozenset({"_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype"})


class BaseModelError(ValueError):
    """The directory is no base model we can serve; the message names the file and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModelInfo:
    """A base model as the control plane sees it.

    Attributes:
        name: Name clients use.
        fingerprint: sha256 over config, tokenizer and weights index, 64 hex digits.
        aliases: Other names adapters may use for it (``base_model_name_or_path``), e.g. its hub id.
        max_position_embeddings: Longest sequence the model was trained for, in tokens.
        config: config.json as read.
    """

    name: str
    fingerprint: str
    aliases: tuple[str, ...]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    config: dict[str, Any]

    def geometry(self, *, dtype: str, page_bytes: int, tp_degree: int = 1) -> Geometry:
        """Return the image geometry of an engine that serves this model."""
        return Geometry(
            dtype=dtype,
            page_bytes=page_bytes,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            tp_degree=tp_degree,
        )


def read_safetensors_index(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return ``{tensor name: (dtype, shape)}`` from a safetensors file's header.

    Raises:
        BaseModelError: If the header is longer than `MAX_HEADER_BYTES` or not what the format says.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) != 8 or (length := struct.unpack("<Q", prefix)[0]) > MAX_HEADER_BYTES:
            raise BaseModelError(f"{path}: not a safetensors file, or its header is too long")
        try:
            data = file.read(length)
            if len(data) != length:
                raise ValueError(f"{len(data)} of {length} bytes")
            header = json.loads(data)
            return {k: (v["dtype"], tuple(v["shape"])) for k, v in header.items() if k != "__metadata__"}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BaseModelError(f"{path}: unreadable safetensors header: {error}") from error


def load_base_model(directory: Path, *, name: str | None = None, aliases: tuple[str, ...] = ()) -> BaseModelInfo:
    """Read a base model's facts.

    Args:
        directory: Holds config.json, tokenizer.json and one or more ``*.safetensors``.
        name: Name clients use; the directory's name if unset.
        aliases: Further names; ``_name_or_path`` of config.json is added if it looks like a hub id.

    Raises:
        BaseModelError: If a file is missing or the architecture is not served.
    """
    config, tokenizer = _read_config(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise BaseModelError(f"{directory}: no *.safetensors; other weight formats are not read")
    index = {k: v for file in files for k, v in read_safetensors_index(file).items()}
    hub_id = str(config.get("_name_or_path") or "")
    known = [*aliases, hub_id] if hub_id.count("/") == 1 and not hub_id.startswith((".", "/")) else list(aliases)
    try:
        num_heads = int(config["num_attention_heads"])
        return BaseModelInfo(
            name=name or directory.resolve().name,
            fingerprint=_fingerprint(config, tokenizer, index),
            aliases=tuple(dict.fromkeys(known)),
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // num_heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
            config=config,
        )
    except KeyError as error:
        raise BaseModelError(f"{directory / 'config.json'}: {error.args[0]} is missing") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BaseModelError(f"{directory / 'config.json'}: {error}") from error


def _read_config(directory: Path) -> tuple[dict[str, Any], str]:
    """Return config.json and the sha256 of tokenizer.json."""
    if problem := model_directory_problem(directory):
        raise BaseModelError(problem)
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
        tokenizer = hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()
    except OSError as error:
        raise BaseModelError(
            f"{error.filename}: {error.strerror}; expected a model directory in Hugging Face layout"
        ) from error
    except ValueError as error:
        raise BaseModelError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{path}: expected a JSON object")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not any(name in ARCHITECTURES for name in architectures):
        raise BaseModelError(f"{directory}: architecture {architectures} is not one of {', '.join(ARCHITECTURES)}")
    return config, tokenizer


def _fingerprint(config: dict[str, Any], tokenizer: str, index: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    facts = {
        "config": {k: v for k, v in config.items() if k not in VOLATILE_KEYS},
        "tokenizer": tokenizer,
        "weights": sorted((k, dtype, list(shape)) for k, (dtype, shape) in index.items()),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
