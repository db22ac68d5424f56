"""Names and identities as they appear on the wire: request ids, digests, adapter references."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Iterable

_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME: Final = re.compile(rf"{_PART}(/{_PART})?", re.ASCII)  # hub ids are valid names
_LABEL: Final = re.compile(_PART, re.ASCII)
_PART_RULE: Final = "1 to 128 letters, digits, '.', '_', '-', the first a letter or a digit"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
MIN_REVISION_DIGITS: Final = 8
_REVISION: Final = re.compile(rf"[0-9a-f]{{{MIN_REVISION_DIGITS},64}}", re.ASCII)
MAX_CANDIDATES: Final = 5
MAX_SHOWN: Final = 160  # characters shown of a refused name
DEFAULT_LABEL: Final = "latest"


def new_request_id() -> str:
    """Return a fresh request id, a UUID4."""
    return str(uuid.uuid4())


def is_digest(text: str) -> bool:
    """Return whether ``text`` is a revision: 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def check_revision(text: str, *, field: str = "revision") -> str:
    """Return ``text`` if it can name a revision: a digest, or its first 8 digits or more. See `find_revision`.

    Raises:
        InvalidParameterError: If it cannot.
    """
    if _REVISION.fullmatch(text) is None:
        raise InvalidParameterError(
            f"{text[:80]!r} is no revision: the first {MIN_REVISION_DIGITS} to all 64 of its lower-case hex digits",
            field=field,
        )
    return text


def find_revision(text: str, known: Iterable[str], *, field: str = "revision") -> str | None:
    """Return the one known digest that is ``text`` or begins with it; None if there is none.

    Raises:
        InvalidParameterError: If several digests begin with it; the message lists them.
    """
    found = sorted({digest for digest in known if digest.startswith(text)})
    if len(found) > 1:
        listed = ", ".join(found[:MAX_CANDIDATES]) + (", ..." if len(found) > MAX_CANDIDATES else "")
        raise InvalidParameterError(
            f"{len(found)} revisions begin with {text}: {listed}; give more digits", field=field
        )
    return found[0] if found else None


def check_adapter_name(name: str, *, field: str = "name") -> str:
    """Return ``name`` if an adapter may have it.

    Raises:
        InvalidParameterError: If it is not; ``field`` names the request's field.
    """
    if _NAME.fullmatch(name) is None or ".." in name:
        raise InvalidParameterError(
            f"{name[:MAX_SHOWN]!r} is no adapter name: {_PART_RULE}; no '..'; as many again behind one '/'", field=field
        )
    return name


def check_label(label: str, *, field: str = "label") -> str:
    """Return ``label`` if an alias may have it.

    Raises:
        InvalidParameterError: If it is not.
    """
    if _LABEL.fullmatch(label) is None:
        raise InvalidParameterError(f"{label[:MAX_SHOWN]!r} is no label: {_PART_RULE}", field=field)
    return label


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """How a caller names an adapter: ``name`` (its label ``latest``), ``name:label`` or ``name@revision``.

    Attributes:
        label: Alias label; None if a revision is given.
        revision: The first 8 to all 64 hex digits, for `find_revision`; None if a label is given.
    """

    name: str
    label: str | None = DEFAULT_LABEL
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, *, field: str = "adapter") -> AdapterRef:
        """Read a reference.

        Raises:
            InvalidParameterError: If name, label or revision is malformed; ``field`` names the request's field.
        """
        name, at, revision = text.partition("@")
        if at:
            return cls(check_adapter_name(name, field=field), None, check_revision(revision, field=field))
        name, colon, label = text.partition(":")
        check_adapter_name(name, field=field)
        return cls(name, check_label(label, field=field) if colon else DEFAULT_LABEL)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision is not None else f"{self.name}:{self.label}"
