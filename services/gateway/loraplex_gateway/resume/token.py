"""Resume tokens: what a stream was asked for and by which tenant, sealed so that only gateways can have written it.

A token is ``base64url(version, body, HMAC-SHA256)``. Its body can be read by every holder and says nothing that a holder does
not know; the seal keeps it from being changed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import TYPE_CHECKING, Final

import msgspec
from loraplex_common.errors import ResumeInvalidError

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION: Final = 1
MAC_BYTES: Final = hashlib.sha256().digest_size
MAX_TOKEN_CHARS: Final = 6144  # of eight adapters with the longest names


class ResumePoint(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One stream as it started; of the body the order of the fields counts, and new ones come last with a default.

    Attributes:
        request_id: The request's id.
        tenant: The tenant that asked.
        fingerprint: The base model's fingerprint.
        adapter: Name of the (first) adapter without label; empty for the base model.
        revision: Digest of the adapter's weights in use, hexadecimal; empty for the base model.
        seed: Seed in use.
        max_new_tokens: Most output tokens, whatever the longest sequence is elsewhere.
        request_digest: SHA-256 of all of the request that decides tokens.
        admitted_at: When time_limit began, unix seconds.
        issued_at: When the token was made, unix seconds.
        more_adapters: Name and revision of each adapter that is added to `adapter`.
        numerics: Numerics of the engine that runs it; None in tokens of earlier versions.
        usage_id: Names its record in the usage ledger; empty without one.
    """

    request_id: str
    tenant: str
    fingerprint: str
    adapter: str
    revision: str
    seed: int
    max_new_tokens: int
    request_digest: bytes
    admitted_at: float
    issued_at: float
    more_adapters: tuple[tuple[str, str], ...] = ()
    numerics: str | None = None
    usage_id: str = ""


_decoder: Final = msgspec.msgpack.Decoder(ResumePoint)
_encoder: Final = msgspec.msgpack.Encoder()


def seal(point: ResumePoint, key: bytes) -> str:
    """Return the token of a stream."""
    signed = bytes([VERSION]) + _encoder.encode(point)
    mac = hmac.digest(key, signed, "sha256")
    return base64.urlsafe_b64encode(signed + mac).rstrip(b"=").decode()


def unseal(token: str, keys: Sequence[bytes]) -> ResumePoint:
    """Return what a token says.

    Args:
        token: As the client sent it.
        keys: Any of them may have sealed it.

    Raises:
        ResumeInvalidError: If none of them has.
    """
    if len(token) > MAX_TOKEN_CHARS:
        raise _not_ours()
    try:
        data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _not_ours() from None
    signed, mac = data[:-MAC_BYTES], data[-MAC_BYTES:]
    if not signed or not any([hmac.compare_digest(hmac.digest(key, signed, "sha256"), mac) for key in keys]):
        raise _not_ours()
    if signed[0] != VERSION:
        raise ResumeInvalidError(
            f"the resume token is of version {signed[0]}, this gateway reads {VERSION}; send the request without resume",
            metadata={"cause": "version"},
        )
    return _decoder.decode(signed[1:])


def _not_ours() -> ResumeInvalidError:
    return ResumeInvalidError(
        "the resume token was not sealed by this deployment: it is cut or changed, or its gateway had another key (all "
        "gateways take one from the same Valkey, or --resume-key-file); send the request without resume",
        metadata={"cause": "forged"},
    )
