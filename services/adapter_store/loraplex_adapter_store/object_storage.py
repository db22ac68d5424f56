"""Buckets of any S3-compatible object storage, and what its failures mean."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterForbiddenError,
    AdapterNotFoundError,
    LoraplexError,
    StoreUnavailableError,
)
from loraplex_common.log import get_logger
from obstore import exceptions
from obstore.store import S3Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_adapter_store.credentials import Credential

_log = get_logger()
SCHEME: Final = "s3"
RETRY_S: Final = 60.0
"""Longest time in which one request is sent again, with growing pauses, while the storage asks for patience."""
MAX_RETRIES: Final = 12
READ_TIMEOUT_S: Final = 30.0
WHOLE_TIMEOUT_S: Final = 3600.0
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,253}[a-z0-9]", re.ASCII)
_FOLDER: Final = re.compile(r"[\w.=+@,~:-]+(/[\w.=+@,~:-]+)*", re.ASCII)
_CODE: Final = re.compile(r"<Code>(\w{1,64})</Code>", re.ASCII)
_STATUS: Final = re.compile(r"status code: (\d{3})\b", re.ASCII)
# Answers by which a storage says that the credential, and not only its rights, is the trouble.
_REFUSED_CREDENTIALS: Final = {
    "ExpiredToken": "has expired",
    "ExpiredTokenException": "has expired",
    "TokenRefreshRequired": "has expired",
    "InvalidToken": "has a session token that is not valid",
    "InvalidAccessKeyId": "has an access key that is not known",
    "SignatureDoesNotMatch": "has a secret key that is not the access key's",
}

_ABSENT: Final = ("NoSuchBucket", "NoSuchKey", "NoSuchVersion")
_FORBIDDEN: Final = ("AccessDenied", "AccountProblem", "AllAccessDisabled")


class CredentialRefusedError(AdapterForbiddenError):
    """The storage does not take the credential: it has expired, or is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """A bucket, or the part of one below a prefix, as an operator names it.

    Attributes:
        name: Name of the bucket.
        prefix: Folder in it, without a slash at either end; empty for all of it.
        endpoint: URL of the storage; None for Amazon's.
        region: Region; None for the environment's, else Amazon's first.
        credential: Name of a credential of the credentials file; empty for that of the environment (`AWS_*`, the
            machine's role).
    """

    name: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    credential: str = ""

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """Read ``s3://bucket[/prefix][?endpoint=URL&region=NAME&credential=NAME]``.

        Raises:
            ValueError: If it is malformed.
        """
        parts = urlsplit(text)
        if parts.scheme != SCHEME or parts.fragment:
            raise ValueError(f"{text!r} is not of the form s3://bucket[/prefix][?endpoint=URL&region=NAME]")
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        if unknown := options.keys() - {"endpoint", "region", "credential"}:
            raise ValueError(f"{text!r}: {', '.join(sorted(unknown))}: only endpoint, region and credential are known")
        endpoint = options.get("endpoint")
        if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
            raise ValueError(f"{text!r}: the endpoint is no http or https URL")
        name, prefix = checked_location(parts.netloc, parts.path.strip("/"))
        return cls(
            name=name,
            prefix=prefix,
            endpoint=endpoint,
            region=options.get("region"),
            credential=options.get("credential", ""),
        )

    def __str__(self) -> str:
        return f"{SCHEME}://{self.name}" + (f"/{self.prefix}" if self.prefix else "")

    def holds(self, name: str, folder: str) -> bool:
        """Whether a folder of a bucket is this one or below it."""
        if name != self.name:
            return False
        return not self.prefix or folder == self.prefix or folder.startswith(self.prefix + "/")

    def open(self, credential: Credential | None, *, is_anonymous: bool = False) -> S3Store:
        """Return a client of the whole bucket, prefix included in no path.

        Args:
            credential: Keys to sign with.
            is_anonymous: Whether requests without a credential go unsigned, instead of with the environment's one.

        Raises:
            InvalidParameterError: If the credential is of another kind.
            ValueError: If the storage cannot be used so.
        """
        config: Any = {"region": self.region} if self.region else {}
        if self.endpoint is not None:
            config["endpoint"] = self.endpoint
        if credential is not None:
            access, secret, token = credential.keys
            config |= {"access_key_id": access, "secret_access_key": secret}
            config |= {"session_token": token} if token else {}
        elif is_anonymous:
            config["skip_signature"] = True
        try:
            return S3Store(self.name, config=config, client_options=self._client_options(), retry_config=RETRIES)
        except exceptions.BaseError as error:
            raise ValueError(f"{self}: {_first_line(error)}") from error

    def _client_options(self) -> Any:
        return {
            "allow_http": self.endpoint is not None and urlsplit(self.endpoint).scheme == "http",
            "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
            "timeout": timedelta(seconds=WHOLE_TIMEOUT_S),
        }


def checked_location(name: str, folder: str) -> tuple[str, str]:
    """Return a bucket's name and a folder in it.

    Raises:
        ValueError: If one of them is malformed.
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name[:80]!r} is no bucket's name")
    if folder and (_FOLDER.fullmatch(folder) is None or any(part in (".", "..") for part in folder.split("/"))):
        raise ValueError(f"{folder[:200]!r} is no folder of a bucket")
    return name, folder


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn the failures of object storage inside the block into errors of the contract.

    Args:
        what: Name of what is read or written, for errors. Answers are not quoted, as they may show addresses: the log
            has them.

    Raises:
        CredentialRefusedError: If the credential has expired or is not known.
        AdapterForbiddenError: If it may not do this.
        AdapterNotFoundError: If there is no such bucket or object.
        AdapterCorruptUploadError: If an object has changed meanwhile.
        StoreUnavailableError: If the storage cannot be reached, or is still too busy after all repetitions.
    """
    try:
        yield
    except (exceptions.BaseError, FileNotFoundError) as error:
        found = _error(what, error)
        _log.warning("object storage refuses", what=what, reason=found.reason, answer=str(error)[:500])
        raise found from error


def answer_of(error: Exception) -> str:
    """Return what a storage has answered: its code, else its status, else the failure's name."""
    text = str(error)
    if match := _CODE.search(text):
        return match[1]
    return f"status {match[1]}" if (match := _STATUS.search(text)) else type(error).__name__


def _error(what: str, error: Exception) -> LoraplexError:
    said = code = answer_of(error)
    if trouble := _REFUSED_CREDENTIALS.get(code):
        return CredentialRefusedError(f"{what}: the credential {trouble} ({code}); renew it in the credentials file")
    # A read that is taken up again in the library fails with its generic class: the code says more.
    if isinstance(error, FileNotFoundError) or code in _ABSENT:
        return AdapterNotFoundError(f"{what}: no such bucket or object ({said})")
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError) or code in _FORBIDDEN:
        return AdapterForbiddenError(f"{what}: the storage refuses this credential ({said}); name one with access")
    if isinstance(error, exceptions.PreconditionError) or code == "PreconditionFailed":
        return AdapterCorruptUploadError(f"{what}: it changed while it was read; import it again")
    return StoreUnavailableError(f"{what}: the object storage answers with {said}", retry_after_s=10.0)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


RETRIES: Final[Any] = {
    "max_retries": MAX_RETRIES,
    "retry_timeout": timedelta(seconds=RETRY_S),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=10),
        "base": 2,
    },
}
