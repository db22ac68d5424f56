"""Requests that cannot be parsed: they are passed on to the layer that can answer the client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Stands for a request that could not be parsed, until the handler's layer answers it."""

    cause: str

    def error(self) -> InvalidParameterError:
        """Return the error for the caller."""
        return InvalidParameterError(f"the request is not a valid message: {self.cause}")


def tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Make a deserializer return `Undecodable` instead of raising at a point from which the client gets no answer."""
    if deserialize is None:
        return None

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception as error:  # any exception of the parser of untrusted bytes
            return Undecodable(str(error) or type(error).__name__)

    return decode
