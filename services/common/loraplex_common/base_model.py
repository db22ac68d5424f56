"""The facts of a base model that all services must agree on: its shape, its names, its fingerprint.

Reads a directory in Hugging Face layout (config.json, tokenizer.json, *.safetensors) without torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.adapter_image import Geometry, ImageError
from loraplex_common.architectures.registry import model_config, served_config
from loraplex_common.base_names import folder_name, hub_id_of
from loraplex_common.config_values import BaseModelError as BaseModelError
from loraplex_common.config_values import parse_json
from loraplex_common.decoder_config import ModelConfig
from loraplex_common.directories import model_directory_problem
from loraplex_common.projections import LayerProjections
from loraplex_common.weight_digests import FileState, weight_digests
from loraplex_common.weight_files import Weights, find_weights

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Keys of config.json that do not affect what the model computes.
VOLATILE_KEYS: Final = frozenset({"_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype"})
FINGERPRINT_FORMAT: Final = 2
"""Version of the fingerprint; version 1 covered only the shapes of tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModelInfo:
    """A base model as the control plane sees it.

    Attributes:
        name: Name that clients use.
        fingerprint: Identity of the model: sha256 over config.json (except `VOLATILE_KEYS`), tokenizer.json and the
            sha256 of the file of each weight, 64 hex digits. It does not cover how to talk to the model (chat template,
            generation defaults), which may be corrected without refusing the model's adapters.
        aliases: Other names that adapters may use for it (``base_model_name_or_path``), e.g. its hub id.
        max_position_embeddings: Longest sequence the model was trained for, in tokens.
        config: config.json as read; of a multimodal model, the one that its text part would have alone.
        layers: What each decoder layer offers to adapters.
        outside: What lies outside of the layers and is offered to adapters: the embedding and lm_head.
        tied_embeddings: Whether lm_head is the embedding, as `ModelConfig` has it.
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
    layers: tuple[LayerProjections, ...]
    outside: LayerProjections = ()
    tied_embeddings: bool = False

    def geometry(self, *, dtype: str, page_bytes: int, tp_degree: int = 1) -> Geometry:
        """Return the image geometry of an engine that serves this model.

        With several tensor-parallel ranks it offers nothing outside of the layers.

        Raises:
            ImageError: If it is none, or heads cannot be divided evenly; ranks that are more than the heads of keys share them.
        """
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if tp_degree <= 0 or heads % tp_degree:  # a projection only tells how wide its heads are together
            raise ImageError(f"num_heads {heads} cannot be split over tp_degree {tp_degree}")
        if kv_heads % tp_degree and tp_degree % kv_heads:
            raise ImageError(f"num_kv_heads {kv_heads} can neither be split over nor shared by tp_degree {tp_degree}")
        outside = self.outside if tp_degree == 1 else ()
        return Geometry.of(self.layers, outside, dtype=dtype, page_bytes=page_bytes, tp_degree=tp_degree)


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A model directory that can be served.

    Attributes:
        config: config.json as read.
        shape: The same, interpreted.
        tokenizer_digest: sha256 of tokenizer.json.
    """

    config: dict[str, Any]
    shape: ModelConfig
    tokenizer_digest: str
    weights: Weights


def check_base_model(directory: Path, *, text_only: bool = False) -> CheckedModel:
    """Check that a directory is a model that can be served, as far as that is known without reading its weights.

    Args:
        directory: Its files.
        text_only: Whether a multimodal model means its text part; without it, one is refused.

    Raises:
        BaseModelError: If a file is missing or broken, the architecture or an entry of config.json is not served, or
            the weights are stored in a form that is not; the message names file, key and remedy.
    """
    if problem := model_directory_problem(directory):
        raise BaseModelError(problem)
    path = directory / "config.json"
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        is_adapter = (directory / "adapter_config.json").is_file()
        found = (
            "this is an adapter: serve its base model, then import it"
            if is_adapter
            else "expected a model directory in Hugging Face layout"
        )
        raise BaseModelError(f"{path}: {error.strerror}; {found}") from error
    except ValueError as error:
        raise BaseModelError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{path}: expected a JSON object")
    shape = model_config(config, str(path), text_only=text_only)
    tokenizer_digest, weights = _tokenizer_digest(directory), find_weights(directory)
    _refuse_quantised_ends(directory, shape, weights)
    lm_head = f"{shape.names.lm_head}.weight"
    if lm_head not in weights.files and not shape.tied_embeddings:
        raise BaseModelError(
            f"{directory}: weight {lm_head} is missing, and config.json does not tie it to the embedding (transformers would "
            "draw it at random): fetch the missing file, or set tie_word_embeddings to true if the model was trained so"
        )
    return CheckedModel(config, shape, tokenizer_digest, weights)


def _refuse_quantised_ends(directory: Path, shape: ModelConfig, weights: Weights) -> None:
    """Refuse an embedding or lm_head that is stored as anything but one whole tensor: adapters may replace its rows."""
    for module in (shape.names.embedding_module, shape.names.lm_head):
        whole = (f"{module}.weight", f"{module}.bias")
        if packed := sorted(name for name in weights.files if name.startswith(f"{module}.") and name not in whole):
            raise BaseModelError(
                f"{directory}: {module} is quantised ({packed[0]}), which is served of the linear layers inside the "
                "decoder only; serve a checkpoint that leaves it whole, as most do"
            )


def load_base_model(
    directory: Path,
    *,
    name: str | None = None,
    aliases: tuple[str, ...] = (),
    text_only: bool = False,
    fingerprint: str | None = None,
) -> BaseModelInfo:
    """Read a base model's facts; hashes its weights unless this machine has done so before.

    Args:
        directory: Holds config.json, tokenizer.json and one or more ``*.safetensors``.
        name: Name that clients use; if unset, the folder's name, or in a hub cache the model's.
        aliases: Further names; the hub id of a directory in a hub cache is added. ``_name_or_path`` of config.json is
            not used: transformers 4.36 to 4.46 saved there the model that this one was made from.
        text_only: Whether a multimodal model means its text part; it is the same model then, with the same fingerprint.
        fingerprint: The model's, if another process of this engine has computed it: the weights are not hashed again.

    Raises:
        BaseModelError: In the cases of `check_base_model`, or if the weights change while they are read.
    """
    checked = check_base_model(directory, text_only=text_only)
    shape = checked.shape
    hub_id = hub_id_of(directory)
    return BaseModelInfo(
        name=name or folder_name(directory),
        fingerprint=fingerprint or _fingerprint(checked),
        aliases=tuple(dict.fromkeys((*aliases, hub_id) if hub_id else aliases)),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        config=served_config(checked.config),
        layers=shape.layers,
        outside=shape.outside,
        tied_embeddings=shape.tied_embeddings,
    )


def state_of_files(directory: Path, *, text_only: bool = False) -> tuple[FileState, ...]:
    """Return the file system's state of the files that a fingerprint covers.

    If the state is the same before the fingerprint is computed and after the model has been loaded, the loaded model is
    the one with that fingerprint.

    Raises:
        BaseModelError: In the cases of `check_base_model`.
    """
    shards = check_base_model(directory, text_only=text_only).weights.shards()
    files = (directory / "config.json", directory / "tokenizer.json", *shards)
    return tuple(FileState.of(path, path.stat()) for path in files)


def check_distinct_names(infos: Iterable[BaseModelInfo]) -> None:
    """Refuse models that have a name in common; one model in two directories is allowed.

    Raises:
        BaseModelError: If a name or alias belongs to two models.
    """
    owners: dict[str, BaseModelInfo] = {}
    for info in infos:
        for name in (info.name, *info.aliases):
            if owners.setdefault(name, info).fingerprint != info.fingerprint:
                raise BaseModelError(
                    f"two base models are named {name!r}: rename one's directory, or give the first --served-model-name"
                )


def _tokenizer_digest(directory: Path) -> str:
    path = directory / "tokenizer.json"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BaseModelError(
            f"{path}: {error.strerror}; expected a model directory in Hugging Face layout: for a model that brings "
            "another tokenizer file, transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it"
        ) from error


def _fingerprint(checked: CheckedModel) -> str:
    try:
        digests = weight_digests(checked.weights.shards())
    except OSError as error:
        raise BaseModelError(f"{error.filename}: {error.strerror}") from error
    weights = sorted((tensor, digests[file]) for tensor, file in checked.weights.all_files().items())
    facts = {
        "format": FINGERPRINT_FORMAT,
        "config": {key: value for key, value in checked.config.items() if key not in VOLATILE_KEYS},
        "tokenizer": checked.tokenizer_digest,
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
