"""Requests that cannot be parsed: they reach the handler's place, where somebody can answer for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Stands for a request that could not be parsed until the handler can answer for it."""

    cause: str

    def error(self) -> InvalidParameterError:
        """Return what the caller is told."""
        return InvalidParameterError(f"the request is not a valid message: {self.cause}")


def tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Make a deserializer return `Undecodable` instead of raising where nobody could answer the client."""
    if deserialize is None:
        return None

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception as error:  # whatever the parser of foreign bytes raises
            return Undecodable(str(error) or type(error).__name__)

    return decode
