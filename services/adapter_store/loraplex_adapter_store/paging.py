"""Pages of lists (AIP-158)."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from loraplex_common.errors import InvalidParameterError

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000


def page_size(asked: int) -> int:
    """Return the page size to use: the default for 0, and the maximum for larger values.

    Raises:
        InvalidParameterError: If it is negative.
    """
    if asked < 0:
        raise InvalidParameterError(f"{asked} is negative", field="page_size")
    return min(asked or DEFAULT_PAGE, MAX_PAGE)


def encode(position: str) -> str:
    """Return the token for the page after ``position``; empty stays empty."""
    return base64.urlsafe_b64encode(position.encode()).decode() if position else ""


def decode(token: str) -> str:
    """Return the position in a token.

    Raises:
        InvalidParameterError: If the token was not made by this store.
    """
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error) as error:
        raise InvalidParameterError("not a page_token of this list", field="page_token") from error


def decode_offset(token: str) -> int:
    """Return the position in a token of a list that is paged by number.

    Raises:
        InvalidParameterError: If the token was not made by this store.
    """
    text = decode(token)
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidParameterError("not a page_token of this list", field="page_token")
    return int(text or 0)
