"""Which files of a model directory hold its weights, and which tensors they contain; read without torch.

`find_weights` gives both the files that the engine loads and the files that the fingerprint covers.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loraplex_common.architectures.text_part import is_multimodal, text_names
from loraplex_common.config_values import BaseModelError, parse_json
from loraplex_common.stored_forms.registry import quantisation_of

MAX_HEADER_BYTES: Final = 100 * 1024 * 1024
SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
IGNORED_SUFFIXES: Final = ("rotary_emb.inv_freq",)
"""Tensors that old exporters wrote and no loader reads."""
SERVED_DTYPES: Final = ("F64", "F32", "F16", "BF16")
PACKED_DTYPES: Final = ("F8_E4M3", "I8", "U8", "I32", "I64")
"""Further types of tensors that make up a quantised weight."""
OTHER_FORMATS: Final = {".gguf": "GGUF", ".bin": "PyTorch", ".pth": "PyTorch", ".pt": "PyTorch", ".npz": "MLX"}
_LFS_POINTER: Final = b"version "


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a model directory; of a multimodal model, those of its text part, by the names that it would have alone.

    Attributes:
        files: Tensor name -> the file that the engine reads it from.
        shapes: Tensor name -> shape.
        stored: Tensor name -> its name in the file, where that is another.
        others: Tensors of a multimodal model's other parts, which are not read -> their files.
    """

    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Path] = field(default_factory=dict)

    def stored_name(self, name: str) -> str:
        """Return a tensor's name in its file."""
        return self.stored.get(name, name)

    def stored_module(self, module: str) -> str:
        """Return the name that a module has in the files, by any of its tensors; its own if it has none."""
        tensor = next((name for name in self.stored if name.startswith(f"{module}.")), None)
        return module if tensor is None else self.stored[tensor].removesuffix(tensor.removeprefix(module))

    def all_files(self) -> dict[str, Path]:
        """Return the file of each tensor, those of other parts included, by the names in the files."""
        return {self.stored_name(name): file for name, file in self.files.items()} | dict(self.others)

    def shards(self) -> tuple[Path, ...]:
        """Return the files, each once."""
        return tuple(sorted({*self.files.values(), *self.others.values()}))


def read_safetensors_index(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return ``{tensor name: (dtype, shape)}`` from a safetensors file's header.

    Raises:
        BaseModelError: If it cannot be read, the header is longer than `MAX_HEADER_BYTES` or not what the format says, or
            the file is not as long as the header says.
    """
    try:
        return _read_header(path)
    except OSError as error:
        raise BaseModelError(f"{path}: {error.strerror}; fetch it again") from error


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == _LFS_POINTER:
            raise BaseModelError(f"{path}: a git-lfs pointer, not the weights; fetch them with git lfs pull")
        if len(prefix) != 8 or (length := struct.unpack("<Q", prefix)[0]) > MAX_HEADER_BYTES:
            raise BaseModelError(f"{path}: not a safetensors file, or its header is too long")
        try:
            data = file.read(length)
            if len(data) != length:
                raise ValueError(f"{len(data)} of {length} bytes")
            header = parse_json(data)
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = 8 + length + max((_end_of(entry) for entry in tensors.values()), default=0)
            index = {name: (str(entry["dtype"]), _shape_of(entry)) for name, entry in tensors.items()}
        except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
            raise BaseModelError(f"{path}: unreadable safetensors header: {error!r}; fetch it again") from error
    if (size := path.stat().st_size) != end:
        raise BaseModelError(f"{path}: {size} of {end} bytes are there; fetch it again")
    return index


def _end_of(entry: Any) -> int:
    begin, end = entry["data_offsets"]
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise ValueError(f"data_offsets {entry['data_offsets']}")
    return end


def _shape_of(entry: Any) -> tuple[int, ...]:
    if not isinstance(entry["shape"], list) or any(type(size) is not int or size < 0 for size in entry["shape"]):
        raise ValueError(f"shape {entry['shape']}")
    return tuple(entry["shape"])


def find_weights(directory: Path) -> Weights:
    """Return the tensors that are a model's weights, checked to be in a type that is served.

    It chooses as transformers does: ``model.safetensors``; without it, the files that the index names; without both,
    every ``*.safetensors``, as long as no two contain the same tensor.

    Raises:
        BaseModelError: If there are none, a file is missing or unreadable, two files contain one tensor and no index
            decides, or weights are stored in a form that is not served.
    """
    weight_map: dict[str, str] = {}
    if (directory / SINGLE_FILE).is_file():
        paths = [directory / SINGLE_FILE]
    elif (directory / INDEX_FILE).is_file():
        weight_map = _read_weight_map(directory / INDEX_FILE)
        paths = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise BaseModelError(f"{directory}: no *.safetensors{_other_formats(directory)}")
    served = SERVED_DTYPES if quantisation_of(directory) is None else (*SERVED_DTYPES, *PACKED_DTYPES)
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        for name, (dtype, shape) in read_safetensors_index(path).items():
            _check_dtype(path, name, dtype, served)
            if name in files and name not in weight_map:
                raise BaseModelError(
                    f"{directory}: {files[name].name} and {path.name} both hold {name}, and no {INDEX_FILE} says which "
                    "counts; fetch the index, or remove the file that does not belong to the model"
                )
            if weight_map.get(name, path.name) == path.name:
                files[name], shapes[name] = path, shape
    if absent := sorted(set(weight_map) - set(files)):
        raise BaseModelError(f"{directory / INDEX_FILE}: {absent[0]} is not in {weight_map[absent[0]]}")
    return _of_text(directory, files, shapes) if is_multimodal(directory) else Weights(files, shapes)


def _of_text(directory: Path, files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    try:
        names = text_names(files)
    except BaseModelError as error:
        raise BaseModelError(f"{directory}: {error}") from error
    own = {name: stored for stored, name in names.items() if name is not None}
    return Weights(
        files={name: files[stored] for name, stored in own.items()},
        shapes={name: shapes[stored] for name, stored in own.items()},
        stored={name: stored for name, stored in own.items() if name != stored},
        others={stored: files[stored] for stored, name in names.items() if name is None},
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: Any = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"{index}: unreadable: {error!r}; fetch it again") from error
    if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
        raise BaseModelError(f"{index}: weight_map does not map tensors to names of files beside it; fetch it again")
    missing = sorted({file for file in weight_map.values() if not (index.parent / file).is_file()})
    if missing:
        raise BaseModelError(f"{index}: names files that are not there: {', '.join(missing)}")
    return weight_map


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name and "\\" not in name


def _check_dtype(path: Path, name: str, dtype: str, served: tuple[str, ...]) -> None:
    if dtype not in served and not name.endswith(IGNORED_SUFFIXES):
        is_packed = dtype in PACKED_DTYPES
        remedy = (
            "quantised weights are not served without their quantization_config in config.json: fetch it again, or serve "
            if is_packed
            else "quantised weights are not served in this type: serve "
        )
        raise BaseModelError(
            f"{path}: {name} is stored as {dtype}; served are {', '.join(served)}: {remedy}the model that was quantised"
        )


def _other_formats(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return "; this is an adapter: serve its base model, then import it"
    found = sorted({OTHER_FORMATS[path.suffix] for path in directory.glob("*") if path.suffix in OTHER_FORMATS})
    formats = f" ({' and '.join(found)} files are there)" if found else ""
    return f"; other weight formats{formats} are not read: fetch or save the model as safetensors"
