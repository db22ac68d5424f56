"""What the metadata of a ScaledObject's trigger asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Mapping

QUEUE_TOKENS: Final = 8192.0
MAX_QUEUE_TOKENS: Final = 1e15
"""Beyond any queue, and exact as a whole number, as KEDA has targets, too."""
PAGE_USAGE: Final = 0.9
_OF_KEDA: Final = frozenset(
    {"scalerAddress", "caCert", "tlsCertFile", "tlsClientCert", "tlsClientKey", "unsafeSsl", "enableTLS"}
)
"""How KEDA reaches us; it passes all of a trigger's metadata on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalerSettings:
    """What one engine is to have of each metric.

    Attributes:
        model: Name or alias of the base model; empty means the only one.
        queue_tokens: Prompt tokens that wait for each engine at most, from ``queueTokens``; above 0, at most
            `MAX_QUEUE_TOKENS`.
        page_usage: Share of each engine's pages that sequences and leased adapters take, above 0, at most 1, from
            ``pageUsage``.
    """

    model: str = ""
    queue_tokens: float = QUEUE_TOKENS
    page_usage: float = PAGE_USAGE

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> ScalerSettings:
        """Return the settings of a trigger.

        Raises:
            InvalidParameterError: If an entry is unknown or malformed.
        """
        for key in metadata:
            if key not in _OF_KEDA and key not in ("model", "queueTokens", "pageUsage"):
                raise InvalidParameterError(
                    f"scalerMetadata has {key!r}, which is none of model, queueTokens and pageUsage",
                    field=f"scalerMetadata.{key}",
                )
        return cls(
            model=metadata.get("model", ""),
            queue_tokens=_number(metadata, "queueTokens", QUEUE_TOKENS, MAX_QUEUE_TOKENS),
            page_usage=_number(metadata, "pageUsage", PAGE_USAGE, 1.0),
        )


def _number(metadata: Mapping[str, str], key: str, default: float, most: float) -> float:
    text = metadata.get(key)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        raise InvalidParameterError(
            f"scalerMetadata.{key} is {text!r}: expected a number greater than 0, at most {most:g}",
            field=f"scalerMetadata.{key}",
        )
    return value
