"""What the parts of one ``loraplex serve`` prove themselves with: made for the run, renewed while it lasts, gone with it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_common.auth import CERTIFICATE_PREFIXES, Role
from loraplex_common.keys_file import KeysFile, KeysFileError

from loraplex_client._profiles import Profile, ServerProfile, profile_path, profile_text
from loraplex_client.credentials.errors import CredentialsError
from loraplex_client.credentials.folder import CA_BUNDLE, CERTIFICATE, KEY, CredentialsFolder, Plan
from loraplex_client.credentials.parties import ADAPTER_STORE, ADMIN, ENGINE, GATEWAY
from loraplex_client.credentials.private_files import FILE_MODE, make_private_folder, write_private
from loraplex_client.credentials.secrets_book import API_KEY, KEYS_FILE
from loraplex_client.serve.child import ChildError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from loraplex_common.auth import Principal

    from loraplex_client.credentials.parties import Party

LIFETIME_S: Final = 30 * 86400.0
LOOK_S: Final = 1.0
"""How old the store's knowledge of the user's keys may be."""
MAX_LOOK_S: Final = 60.0
"""Longest time between two looks at the certificates: this machine may have slept through their end."""
PARTIES: Final = (GATEWAY, ENGINE, ADAPTER_STORE, ADMIN)


class ServeIdentity:
    """The credentials of one run, below the data folder, where only this user gets at them.

    Args:
        data_dir: Data folder of the stack; runs that share it have a folder each.
        user_keys: Keys file of the gateway's users; the store knows them by the same keys.
        lifetime_s: How long certificates are good, in seconds; they are renewed after two thirds of it.

    Raises:
        ChildError: If files cannot be written or the keys file cannot be used.
    """

    def __init__(self, data_dir: Path, *, user_keys: Path | None = None, lifetime_s: float = LIFETIME_S) -> None:
        self._plan = Plan(
            lifetime=datetime.timedelta(seconds=lifetime_s), renews_within=datetime.timedelta(seconds=lifetime_s / 3)
        )
        self._user_keys = None if user_keys is None else KeysFile(user_keys)
        self._look_s = min(MAX_LOOK_S, lifetime_s / 10)
        self._keys_to_write: Mapping[bytes, Principal] | None = None
        self._profile: Path | None = None
        try:
            self.path, self._lock = _claim_folder(data_dir / "credentials")
            self._folder = CredentialsFolder(self.path, PARTIES)
            self._folder.make(self._plan)
            self._own_keys = (self.path / ADAPTER_STORE.folder / KEYS_FILE).read_text()
            if self._user_keys is not None:
                self._write_store_keys(self._user_keys.read())
        except OSError as error:
            raise ChildError(f"{error.filename}: {error.strerror}") from error
        except KeysFileError as error:
            self.close()
            raise ChildError(str(error)) from error

    def store_flags(self) -> tuple[str, ...]:
        """Return what the adapter store is started with."""
        return self._server_flags(ADAPTER_STORE)

    def engine_flags(self) -> tuple[str, ...]:
        """Return what the engine is started with."""
        return (*self._server_flags(ENGINE), *self._peer_flags(ENGINE), "--store-tls-name", ADAPTER_STORE.tls_name)

    def gateway_flags(self) -> tuple[str, ...]:
        """Return what the gateway is started with; the user says which callers it lets in."""
        names = ("--engine-tls-name", ENGINE.tls_name, "--store-tls-name", ADAPTER_STORE.tls_name)
        return (*self._peer_flags(GATEWAY), *names)

    def leave_profile(self, *, gateway: str, store: str, engines: Sequence[str]) -> Path:
        """Leave a profile for the command line and the clients of this user; return its file.

        Raises:
            ChildError: If it cannot be written.
        """
        own = self.path / ADMIN.folder
        files = {"tls_ca": own / CA_BUNDLE, "tls_cert": own / CERTIFICATE, "tls_key": own / KEY}
        key = own / API_KEY
        profile = Profile(
            gateway=ServerProfile(target=gateway),
            store=ServerProfile(target=store, tls_name=ADAPTER_STORE.tls_name, api_key_file=key, **files),
            engine=ServerProfile(target=",".join(engines), tls_name=ENGINE.tls_name, api_key_file=key, **files),
            lock=self.path / "lock",
        )
        path = profile_path(gateway)
        try:
            make_private_folder(path.parent)
            write_private(path, profile_text(profile))
        except OSError as error:
            raise ChildError(f"{error.filename}: {error.strerror}") from error
        self._profile = path
        return path

    async def keep_fresh(self, report: Callable[[str], None]) -> None:
        """Renew certificates before they end and hand on changes of the user's keys, until cancelled.

        Args:
            report: Told once in a row what is in the way; it is tried again until it goes.
        """
        troubles: dict[str, str] = {}
        renew_at = 0.0

        def note(what: str, error: Exception | None) -> None:
            cause = "" if error is None else f"{what}: {error}"
            if cause and cause != troubles.get(what):
                report(cause)
            troubles[what] = cause

        while True:
            await asyncio.sleep(min(LOOK_S, self._look_s))
            # First, and whatever becomes of the certificates: a key that was taken away must not stay good at the store.
            note("changed API keys cannot be handed on to the adapter store", self._hand_on_keys())
            if time.monotonic() >= renew_at:
                error = await asyncio.to_thread(self._renew)
                note("credentials cannot be renewed", error)
                renew_at = time.monotonic() + (self._look_s if error is None else 0.0)

    def close(self) -> None:
        """Remove the profile and the credentials; they are good for nothing any more."""
        if self._profile is not None and f'"{self.path}/lock"' in _text(self._profile):
            self._profile.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # closed before
            os.close(self._lock)

    def _hand_on_keys(self) -> OSError | None:
        """Let the store know changes of the user's keys; return what is in the way."""
        if self._user_keys is not None:
            changed = self._user_keys.read_if_changed()
            self._keys_to_write = self._keys_to_write if changed is None else changed
        try:
            if self._keys_to_write is not None:
                self._write_store_keys(self._keys_to_write)
        except OSError as error:
            return error
        self._keys_to_write = None
        return None

    def _renew(self) -> Exception | None:
        """Renew certificates if they end soon; return what is in the way."""
        try:
            self._folder.make(self._plan)
        except (OSError, CredentialsError) as error:
            return error
        return None

    def _server_flags(self, party: Party) -> tuple[str, ...]:
        own = self.path / party.folder
        return (
            *("--api-keys-file", str(own / KEYS_FILE), "--tls-client-ca", str(own / CA_BUNDLE)),
            *("--tls-cert", str(own / CERTIFICATE), "--tls-key", str(own / KEY)),
        )

    def _peer_flags(self, party: Party) -> tuple[str, ...]:
        own = self.path / party.folder
        return (
            *("--peer-tls-ca", str(own / CA_BUNDLE), "--peer-tls-cert", str(own / CERTIFICATE)),
            *("--peer-tls-key", str(own / KEY), "--peer-api-key-file", str(own / API_KEY)),
        )

    def _write_store_keys(self, users: Mapping[bytes, Principal]) -> None:
        """Let the store know the gateway's users. Their certificates are of no authority that it trusts."""
        lines = [
            f"sha256:{key.hex()} {user.name} {user.role}\n"
            for key, user in users.items()
            if user.role in (Role.TENANT, Role.ADMIN) and not key.startswith(_PREFIXES)
        ]
        write_private(self.path / ADAPTER_STORE.folder / KEYS_FILE, self._own_keys + "".join(lines))


_PREFIXES: Final = tuple(prefix.encode() for prefix in CERTIFICATE_PREFIXES)


def _claim_folder(parent: Path) -> tuple[Path, int]:
    """Make a folder whose lock this process holds for as long as it lives; remove those of runs that were killed.

    Returns:
        The folder and the descriptor of its lock.
    """
    make_private_folder(parent)
    with _locked(parent / ".lock"):  # no run takes a folder for a dead run's before its lock is held
        for other in parent.iterdir():
            if other.is_dir():
                _remove_if_dead(other)
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
        descriptor = os.open(folder / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return folder, descriptor


def _remove_if_dead(folder: Path) -> None:
    try:
        with _locked(folder / "lock", fcntl.LOCK_NB):
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its owner runs


@contextlib.contextmanager
def _locked(path: Path, options: int = 0) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | options)
        yield
    finally:
        os.close(descriptor)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
