"""Reads the file of ``loraplex adapters apply``: which adapters a store is to have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import yaml
from loraplex_common.errors import InvalidParameterError
from loraplex_common.ids import check_adapter_name, check_label

if TYPE_CHECKING:
    from pathlib import Path

HUB_SOURCE: Final = re.compile(r"hf:(?P<repo>[^@/]+/[^@/]+)(/(?P<subfolder>[^@]+))?@(?P<revision>[0-9a-fA-F]{40})")
MAX_WEIGHT: Final = 1_000_000
MAX_SHARES: Final = 16
_FIELDS: Final = {"source", "description", "tenants", "labels", "base_model", "also_base_models"}

Pointer: TypeAlias = "str | Mapping[str, int]"
"""Where a label points: a revision or another label; or several of them, with weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedAdapter:
    """An adapter as the file has it. What is None is left as it is.

    Attributes:
        source: A directory, absolute, or ``hf:ORG/REPO[/SUBFOLDER]@COMMIT``.
        base_model: Base model to check the source against instead of the one it names; may be empty.
        also_base_models: Further base models that the source may serve on.
        labels: Label -> where it points; ``latest`` is where the source was imported to.
    """

    name: str
    source: str | None = None
    description: str | None = None
    tenants: tuple[str, ...] | None = None
    labels: Mapping[str, Pointer] | None = None
    base_model: str = ""
    also_base_models: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which yaml would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands here twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_manifest(path: Path) -> tuple[WantedAdapter, ...]:
    """Return the adapters of a file, in its order.

    Raises:
        InvalidParameterError: If the file cannot be read, or has anything that is not understood; the message names it.
    """
    try:
        read = yaml.load(path.read_text(), _Loader)  # a SafeLoader
    except OSError as error:
        raise InvalidParameterError(f"{path}: {error.strerror}", field="file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidParameterError(f"{path}: {error}", field="file") from error
    entries = _mapping(read, str(path), {"adapters"}).get("adapters")
    named = _mapping(entries, f"{path}: adapters", None)
    return tuple(_adapter(name, fields, path) for name, fields in named.items())


def _adapter(name: str, read: Any, path: Path) -> WantedAdapter:
    where = f"{path}: {name}"
    check_adapter_name(name, field=where)
    fields = _mapping({} if read is None else read, where, _FIELDS)
    tenants, labels, description = fields.get("tenants"), fields.get("labels"), fields.get("description")
    if tenants is not None and not (isinstance(tenants, list) and all(isinstance(each, str) for each in tenants)):
        raise _wrong(where, "tenants is no list of names")
    if description is not None and not isinstance(description, str):
        raise _wrong(where, "description is no text")
    base_model, also = _bases(fields, where)
    pointers = None if labels is None else _mapping(labels, f"{where}: labels", None)
    return WantedAdapter(
        name=name,
        source=_source(fields.get("source"), where, path.parent),
        description=description,
        base_model=base_model,
        also_base_models=also,
        tenants=None if tenants is None else tuple(tenants),
        labels=None if pointers is None else {label: _pointer(label, to, where) for label, to in pointers.items()},
    )


def _bases(fields: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    base, also = fields.get("base_model"), fields.get("also_base_models")
    if base is not None and not (isinstance(base, str) and base):
        raise _wrong(where, "base_model is no name")
    if also is not None and not (isinstance(also, list) and all(isinstance(each, str) and each for each in also)):
        raise _wrong(where, "also_base_models is no list of names")
    if (base or also) and fields.get("source") is None:
        raise _wrong(where, "base_model and also_base_models are about source, which is missing")
    return base or "", tuple(also or ())


def _source(source: Any, where: str, beside: Path) -> str | None:
    if source is None:
        return None
    if not isinstance(source, str) or not source:
        raise _wrong(where, "source is no text")
    if source.startswith("hf:"):
        if HUB_SOURCE.fullmatch(source) is None:
            raise _wrong(where, f"source {source!r} is not hf:ORG/REPO[/SUBFOLDER]@COMMIT (40 hex digits)")
        return source
    return str((beside / source).absolute())


def _pointer(label: str, to: Any, where: str) -> Pointer:
    check_label(label, field=where)
    if label == "latest":
        raise _wrong(where, "label latest is where source was imported to: leave it out")
    if isinstance(to, str) and to:
        return to
    if not isinstance(to, dict) or not to:
        raise _wrong(where, f"label {label} is no revision in quotes and no table of revision: weight")
    for revision, weight in to.items():
        if not isinstance(revision, str) or not isinstance(weight, int) or isinstance(weight, bool):
            raise _wrong(where, f"label {label}: {revision!r}: {weight!r} is no revision in quotes with a whole weight")
        if not 1 <= weight <= MAX_WEIGHT:
            raise _wrong(where, f"label {label}: {revision!r}: weight {weight} is not between 1 and {MAX_WEIGHT}")
    if len(to) > MAX_SHARES:
        raise _wrong(where, f"label {label} is split between {len(to)} revisions, at most {MAX_SHARES}")
    return dict(to)


def _mapping(read: Any, where: str, known: set[str] | None) -> dict[str, Any]:
    if not isinstance(read, dict):
        raise _wrong(where, "it is no table")
    for key in read:
        if not isinstance(key, str):
            raise _wrong(where, f"{key!r} is no name: put it in quotes")
        if known is not None and key not in known:
            raise _wrong(where, f"{key} is not one of {', '.join(sorted(known))}")
    return read


def _wrong(where: str, what: str) -> InvalidParameterError:
    return InvalidParameterError(f"{where}: {what}", field="file")
