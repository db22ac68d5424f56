"""A folder of credentials: one folder per participant, made once, renewed without a moment in which two do not get on.

A renewal keeps what was good before beside what is new, until `Plan.drops_old`: authorities in ``ca.crt``, hashes of
keys in keys files, hashes of passwords in Valkey's users. So services may read their files again in any order.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_client._connection import DEFAULT_TARGET, store_beside
from loraplex_client._profiles import Profile, ServerProfile, profile_text
from loraplex_client.credentials.authority import Authority, CertificateRequest
from loraplex_client.credentials.certificates import (
    Certificate,
    belong_together,
    is_signed_by,
    read_bundle,
    read_certificate,
)
from loraplex_client.credentials.errors import CredentialsError
from loraplex_client.credentials.parties import ADAPTER_STORE, ADMIN, ENGINE, LOCAL_HOSTS, PARTIES, Party
from loraplex_client.credentials.private_files import make_private_folder, write_private
from loraplex_client.credentials.secrets_book import API_KEY, SecretsBook

if TYPE_CHECKING:
    from collections.abc import Callable

CA_BUNDLE: Final = "ca.crt"
CERTIFICATE: Final = "tls.crt"
KEY: Final = "tls.key"
PROFILE: Final = "profile.json"
SETTLE_S: Final = 2.0
"""Services on this machine have read a changed file by then."""
UNFINISHED: Final = ".unfinished"
"""Lies there while a folder is made for the first time: what is in it then was never handed out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is wanted of a folder.

    Attributes:
        hosts: Folder of a participant -> DNS names and IP addresses at which it is reached, on top of the local ones and of
            those that its certificate names already.
        lifetime: How long a certificate is good.
        keeps_ca_key: Whether the authority's key stays in ``ca/``, to sign further certificates.
        renews: Whether certificates are issued anew.
        renews_within: Certificates that end within this are issued anew, too.
        renews_keys: Whether API keys and Valkey's passwords are drawn anew.
        drops_old: Whether what was renewed before is trusted no more.
        gateway_target: Where the administrator's command line finds the gateway; None leaves it as it is.
        store_target: Where it finds the adapter store.
    """

    hosts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lifetime: datetime.timedelta = datetime.timedelta(days=365)
    keeps_ca_key: bool = False
    renews: bool = False
    renews_within: datetime.timedelta = datetime.timedelta(0)
    renews_keys: bool = False
    drops_old: bool = False
    gateway_target: str | None = None
    store_target: str | None = None


class CredentialsFolder:
    """All credentials of a deployment.

    Args:
        path: Made if it is missing.
        parties: Services and users that take part.
        pause: Waits, in seconds, between what verifies and what is verified.
    """

    def __init__(
        self, path: Path, parties: tuple[Party, ...] = PARTIES, *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self.path = path
        self._pause = pause
        self._parties = parties
        self._holders = tuple(party for party in parties if party.has_certificate)

    @property
    def ends(self) -> datetime.datetime:
        """When the first certificate ends."""
        return min(self.certificate_of(party).ends for party in self._holders)

    def certificate_of(self, party: Party) -> Certificate:
        """Return what a participant's certificate says.

        Raises:
            CredentialsError: If it is missing or unreadable.
        """
        return read_certificate(self.path / party.folder / CERTIFICATE)

    def make(self, plan: Plan) -> list[str]:
        """Make what is missing and renew what the plan says; return what was done, a line each.

        Raises:
            CredentialsError: If what is there does not fit the plan, or another process is at work on it; nothing is
                changed then.
            OSError: If a file cannot be read or written.
        """
        make_private_folder(self.path)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return self._make(plan)
        except BlockingIOError:
            raise CredentialsError(f"{self.path}: another process is making credentials here: wait for it") from None
        finally:
            os.close(descriptor)

    def _make(self, plan: Plan) -> list[str]:
        if self._is_fresh():
            done = self._make_first(plan)
            self._set_targets(plan)
            return done
        self._require_complete()
        is_cut_short = self._is_cut_short()
        if is_cut_short and plan.drops_old and not plan.renews:
            raise CredentialsError(
                f"{self.path}: a renewal was cut short, and what it has left is trusted by the old authority alone: finish it "
                "with --renew, hand it on, and drop what is old then"
            )
        renews = plan.renews or is_cut_short or self.ends - datetime.datetime.now(datetime.UTC) < plan.renews_within
        if not renews:
            self._require_hosts(plan)
        done = []
        if plan.drops_old or plan.renews_keys:
            book = SecretsBook(self.path, self._parties, pause=lambda: self._pause(SETTLE_S))
            book.write(renews=plan.renews_keys, drops_old=plan.drops_old)
            done.append(
                "drew new API keys and Valkey passwords" if plan.renews_keys else "only the newest keys are good"
            )
        if renews:
            self._certify(plan)
            done.append("issued new certificates")
        if plan.drops_old:
            if renews:
                self._pause(SETTLE_S)
            self._write_bundle(self._authorities()[:1])
            done.append("only the newest certificate authority is trusted")
        if self._set_targets(plan):
            done.append("wrote where gateway and store are into the administrator's profile")
        return done

    def _make_first(self, plan: Plan) -> list[str]:
        make_private_folder(self.path)
        write_private(self.path / UNFINISHED, b"")
        for party in self._parties:
            make_private_folder(self.path / party.folder)
        self._write_bundle([])
        SecretsBook(self.path, self._parties).write(renews=True, drops_old=True)
        self._certify(plan)
        (self.path / UNFINISHED).unlink()
        return ["made certificates, API keys and Valkey passwords"]

    def issue(self, authority: Authority, plan: Plan) -> None:
        """Issue every holder a new certificate. The key is written first: a reader in between finds no pair."""
        for party in self._holders:
            issued = authority.issue(
                CertificateRequest(
                    common_name=party.folder,
                    hosts=self._hosts(party, plan),
                    is_server=bool(party.tls_name),
                    lifetime=plan.lifetime,
                )
            )
            write_private(self.path / party.folder / KEY, issued.key)
            write_private(self.path / party.folder / CERTIFICATE, issued.certificate)
        if not (self.path / ADMIN.folder / PROFILE).exists():
            write_private(self.path / ADMIN.folder / PROFILE, self._first_profile())

    def _first_profile(self) -> str:
        """Return what `--profile` of the administrator's command line reads; files are named beside it."""
        own = ServerProfile(
            tls_ca=Path(CA_BUNDLE), tls_cert=Path(CERTIFICATE), tls_key=Path(KEY), api_key_file=Path(API_KEY)
        )
        gateway = ServerProfile(target=DEFAULT_TARGET)
        store = replace(own, target=store_beside(DEFAULT_TARGET), tls_name=ADAPTER_STORE.tls_name)
        return profile_text(Profile(gateway=gateway, store=store, engine=replace(own, tls_name=ENGINE.tls_name)))

    def _set_targets(self, plan: Plan) -> bool:
        """Write into the administrator's profile where the servers are; return whether that changed it."""
        targets = {"gateway": plan.gateway_target, "store": plan.store_target}
        if not any(targets.values()):
            return False
        path = self.path / ADMIN.folder / PROFILE
        before = path.read_text() if path.exists() else self._first_profile()
        try:
            values = json.loads(before)
            for kind, target in targets.items():
                values[kind].update({"target": target} if target else {})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CredentialsError(f"{path} is no profile: delete it, and it is made anew") from error
        text = json.dumps(values, indent=2) + "\n"
        if text == before and path.exists():
            return False
        write_private(path, text)
        return True

    def _certify(self, plan: Plan) -> None:
        """Issue all certificates; every party trusts the authority before the first of them is there."""
        authority = self._kept_authority(plan) or Authority.create()
        before = [pem for pem in self._authorities() if pem != authority.certificate]
        # More than one if the last renewal was cut short: what it has not come to is in use as well.
        before = [pem for n, pem in enumerate(before) if n == 0 or self._has_signed(pem)]
        self._write_bundle([authority.certificate, *before])
        if before:
            self._pause(SETTLE_S)
        self.issue(authority, plan)
        kept = self.path / "ca"
        (kept / KEY).unlink(missing_ok=True)  # a key that lies there is that of the certificate beside it, always
        if plan.keeps_ca_key:
            make_private_folder(kept)
            write_private(kept / CERTIFICATE, authority.certificate)
            write_private(kept / KEY, authority.key())
        else:
            (kept / CERTIFICATE).unlink(missing_ok=True)

    def _kept_authority(self, plan: Plan) -> Authority | None:
        """Return the authority whose key was kept, if it can sign for the whole lifetime of a certificate."""
        folder = self.path / "ca"
        if not (folder / KEY).exists():
            return None
        authority = Authority.load((folder / CERTIFICATE).read_bytes(), (folder / KEY).read_bytes())
        lasts = authority.ends - datetime.datetime.now(datetime.UTC)
        return authority if lasts > plan.lifetime else None

    def _authorities(self) -> list[bytes]:
        """Return the trusted authorities, PEM, newest first."""
        return read_bundle(self.path / self._holders[0].folder / CA_BUNDLE)

    def _write_bundle(self, authorities: list[bytes]) -> None:
        for party in self._parties:
            write_private(self.path / party.folder / CA_BUNDLE, b"".join(authorities))

    def _files(self) -> list[Path]:
        files = [self.path / party.folder / CA_BUNDLE for party in self._parties]
        files += [self.path / party.folder / name for party in self._holders for name in (CERTIFICATE, KEY)]
        return files + SecretsBook(self.path, self._parties).files()

    def _is_fresh(self) -> bool:
        return (self.path / UNFINISHED).exists() or not any(file.exists() for file in self._files())

    def _require_complete(self) -> None:
        missing = [str(file.relative_to(self.path)) for file in self._files() if not file.exists()]
        if missing:
            raise CredentialsError(
                f"{self.path}: {', '.join(missing)} missing, the rest is there: put it back, or make everything anew in an "
                "empty folder"
            )

    def _require_hosts(self, plan: Plan) -> None:
        for party in self._holders:
            named = self.certificate_of(party).hosts
            absent = [host for host in self._hosts(party, plan) if host not in named]
            if absent:
                raise CredentialsError(
                    f"{self.path / party.folder / CERTIFICATE} does not name {', '.join(absent)}: issue it anew with --renew"
                )

    def _is_cut_short(self) -> bool:
        """Tell whether a renewal ended between a key and its certificate, or before all certificates were there."""
        return any(
            not belong_together(self.path / party.folder / CERTIFICATE, self.path / party.folder / KEY)
            for party in self._holders
        ) or any(map(self._has_signed, self._authorities()[1:]))

    def _has_signed(self, authority: bytes) -> bool:
        """Tell whether a certificate that is there is of an authority, PEM."""
        return any(is_signed_by(self.path / party.folder / CERTIFICATE, authority) for party in self._holders)

    def _hosts(self, party: Party, plan: Plan) -> tuple[str, ...]:
        if not party.tls_name:
            return ()
        there = (self.path / party.folder / CERTIFICATE).exists()
        named = self.certificate_of(party).hosts if there else ()
        return tuple(dict.fromkeys((party.tls_name, *LOCAL_HOSTS, *named, *plan.hosts.get(party.folder, ()))))
