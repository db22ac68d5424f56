"""Client profiles: where servers are and what we prove ourselves with, in a file.

``loraplex serve`` leaves one for its user while it runs, named after the gateway's address; ``loraplex credentials make``
writes one for an administrator, which ``--profile`` names. Secrets are in files of their own.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

LOCAL_NAMES: Final = ("localhost", "0.0.0.0", "[::]", "ip6-localhost")
LOCAL_ADDRESS: Final = "127.0.0.1"


class ProfileError(RuntimeError):
    """A client profile cannot be used; the message names the file and the remedy, never a secret."""


class StaleProfileWarning(UserWarning):
    """A ``loraplex serve`` has ended without taking its client profile along."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerProfile:
    """How to reach servers of one kind.

    Attributes:
        target: ``host:port``; of several engines, separated by commas.
        tls_ca: Certificates to trust, PEM; turns TLS on.
        tls_cert: Client certificate, PEM, with its key in ``tls_key``.
        tls_name: Name that has to stand in the server's certificate instead of the host dialled.
        api_key_file: Holds the API key.
    """

    target: str | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_name: str | None = None
    api_key_file: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One deployment.

    Attributes:
        lock: File that ``loraplex serve`` keeps locked while it runs; None for a profile that no process has to hold.
    """

    gateway: ServerProfile = ServerProfile()
    store: ServerProfile = ServerProfile()
    engine: ServerProfile = ServerProfile()
    lock: Path | None = None


def profile_text(profile: Profile) -> str:
    """Return a profile as the text of its file."""
    values = {
        kind: {name: str(value) for name, value in asdict(getattr(profile, kind)).items() if value is not None}
        for kind in ("gateway", "store", "engine")
    }
    lock = {} if profile.lock is None else {"lock": str(profile.lock)}
    return json.dumps({**values, **lock}, indent=2) + "\n"


def read_profile(path: Path) -> Profile:
    """Read a profile; files that it names relatively lie beside it.

    Raises:
        ProfileError: If it is missing or malformed.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ProfileError(f"client profile {path}: {error.strerror}") from error
    except ValueError as error:
        raise ProfileError(f"client profile {path}: it is no JSON: {error}") from error
    if not isinstance(values, dict) or values.keys() - {field.name for field in fields(Profile)}:
        raise ProfileError(f"client profile {path}: expected an object with gateway, store, engine")
    sections = {kind: _section(path, kind, values.get(kind, {})) for kind in ("gateway", "store", "engine")}
    lock = values.get("lock")
    return Profile(**sections, lock=None if lock is None else path.parent / str(lock))


def _section(path: Path, kind: str, values: Any) -> ServerProfile:
    known = {field.name for field in fields(ServerProfile)}
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ProfileError(f"client profile {path}: {kind} must be an object of strings")
    if unknown := values.keys() - known:
        raise ProfileError(
            f"client profile {path}: {kind} has no {', '.join(sorted(unknown))}: {', '.join(sorted(known))}"
        )
    return ServerProfile(
        **{name: value if name in ("target", "tls_name") else path.parent / value for name, value in values.items()}
    )


def profiles_dir() -> Path:
    """Return where ``loraplex serve`` leaves profiles: below ``$XDG_STATE_HOME``, else ``~/.local/state``."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base).expanduser() / "loraplex" / "clients"


def local_address(target: str) -> str:
    """Return an address in the spelling that profiles are found by: names of this machine's loopback are one."""
    host, colon, port = target.rpartition(":")
    return f"{LOCAL_ADDRESS}:{port}" if colon and host in LOCAL_NAMES else target


def profile_path(gateway: str) -> Path:
    """Return where the profile of the gateway at ``gateway`` lies."""
    return profiles_dir() / f"{local_address(gateway)}.json"


def found_profile(kind: str, target: str) -> Profile | None:
    """Return the profile that a running ``loraplex serve`` of this user has left for a server.

    Args:
        kind: ``gateway``, ``store`` or ``engine``.
        target: Its address.

    Raises:
        ProfileError: If there is one that cannot be used.
    """
    if sys.platform == "win32":  # serve does not run there
        return None
    address = local_address(target)
    for path in _candidates(kind, target):
        profile = read_profile(path)
        known = getattr(profile, kind).target
        if known is None or address not in map(local_address, known.split(",")):
            continue
        if _is_held(profile.lock):
            return profile
        warnings.warn(
            f"{path} is of a loraplex serve that has ended, and is left alone: start serve again, or delete the file",
            StaleProfileWarning,
            stacklevel=4,
        )
    return None


def _candidates(kind: str, target: str) -> list[Path]:
    """Return the files that may name a server; files of other users are left out."""
    paths = [profile_path(target)] if kind == "gateway" else sorted(profiles_dir().glob("*.json"))
    found = []
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            continue
        if state.st_uid == os.geteuid() and not state.st_mode & 0o022:
            found.append(path)
    return found


def _is_held(lock: Path | None) -> bool:
    """Tell whether the owner of a profile still runs."""
    import fcntl  # not there on Windows

    if lock is None:
        return False
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
