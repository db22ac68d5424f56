"""What may be resolved at request time: the operator's list of sources, and the tenants that each is for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

from loraplex_common.adapter_sources import HUB, is_source
from loraplex_common.errors import AdapterForbiddenError, AdapterNotFoundError, InvalidParameterError
from loraplex_common.ids import MAX_SHOWN

from loraplex_adapter_store.imports.hub import HubSource

if TYPE_CHECKING:
    from collections.abc import Sequence

_HUB: Final = re.compile(
    r"hf:(?P<repo>[^/@]+/[^/@]+)(?:(?P<folder>(?:/[^/@]+)*)(?:@(?P<commit>[^/@]+))?|@(?P<before>[^/@]+)/(?P<behind>[^@]+))"
)
_PREFIX: Final = re.compile(r"(hf:|s3://|oci://)[!-~]*", re.ASCII)
MAX_CHARS: Final = 512
"""What a gateway takes as an adapter's name at most."""
_OPTIONS: Final = ("credential", "base", "tenant")


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedSource:
    """A source as a request names it.

    Attributes:
        text: Its one spelling: ``hf:org/name@commit/folder`` or the URI.
        hub: The folder of the hub; None for a URI.
    """

    text: str
    hub: HubSource | None = None

    @classmethod
    def parse(cls, text: str) -> AskedSource:
        """Read ``hf:org/name[/folder][@commit]``, ``hf:org/name@commit/folder``, ``s3://...`` or ``oci://...``.

        Raises:
            InvalidParameterError: If it is malformed. What is wrong with a URI is said where it is located.
        """
        if len(text) > MAX_CHARS:
            raise InvalidParameterError(f"{text[:80]!r}... has more than {MAX_CHARS} characters", field="source")
        if not is_source(text):
            raise InvalidParameterError(
                f"{text[:200]!r} is no source: hf:org/name[@commit], s3://bucket/folder or "
                "oci://registry/repository@sha256:...",
                field="source",
            )
        if not text.startswith(HUB):
            return cls(text=text.rstrip("/"))
        match = _HUB.fullmatch(text)
        if match is None:
            raise InvalidParameterError(
                f"{text[:200]!r} is not of the form hf:org/name[/folder][@commit]", field="source"
            )
        folder = match["behind"] or (match["folder"] or "").removeprefix("/")
        return cls.of(
            HubSource(repo=match["repo"], revision=match["commit"] or match["before"] or "", subfolder=folder)
        )

    @classmethod
    def of(cls, hub: HubSource) -> AskedSource:
        """Return a folder of the hub.

        Raises:
            InvalidParameterError: If it is malformed.
        """
        hub.check()
        return cls(text=str(hub), hub=hub)

    @property
    def is_pinned(self) -> bool:
        """Whether it names one state for ever; a folder of object storage is taken as it is when it is read first."""
        return self.hub is None or bool(self.hub.revision)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of object storage, which may change."""
        return self.text.startswith("s3:")

    @property
    def place(self) -> str:
        """What rules are about: the source without its commit or digest."""
        if self.hub is None:
            return self.text.partition("@sha256:")[0]
        folder = f"/{self.hub.subfolder}" if self.hub.subfolder else ""
        return f"{HUB}{self.hub.repo}{folder}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolveRule:
    """Sources that requests may name.

    Attributes:
        prefix: What they are or lie below, e.g. ``hf:acme/`` or ``s3://bucket/folder``.
        tenants: Tenants whose requests may; none means all.
        credential: Name of the credential that the source is read with; may be empty.
        base: Base model to use instead of the checkpoint's own declaration; may be empty.
    """

    prefix: str
    tenants: tuple[str, ...] = ()
    credential: str = ""
    base: str = ""

    @classmethod
    def parse(cls, text: str) -> ResolveRule:
        """Read ``SOURCE[?tenant=NAME&tenant=NAME&credential=NAME&base=NAME]``.

        Raises:
            ValueError: If it is malformed.
        """
        prefix, mark, query = text.partition("?")
        if _PREFIX.fullmatch(prefix) is None:
            raise ValueError(f"{text!r} does not begin with hf:, s3:// or oci://")
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(mark))
        if unknown := {name for name, _ in options}.difference(_OPTIONS):
            raise ValueError(f"{text!r}: {', '.join(sorted(unknown))}: only {', '.join(_OPTIONS)} are known")
        if (mark and not options) or any(not value for _, value in options):
            raise ValueError(f"{text!r}: an option has no value")
        single = dict(options)
        if len(options) != len(single) + sum(name == "tenant" for name, _ in options) - ("tenant" in single):
            raise ValueError(f"{text!r}: credential and base come once each")
        return cls(
            prefix=prefix,
            tenants=tuple(value for name, value in options if name == "tenant"),
            credential=single.get("credential", ""),
            base=single.get("base", ""),
        )

    def __str__(self) -> str:
        return self.prefix

    def covers(self, place: str) -> bool:
        """Whether a place is the rule's, or lies below it; names that merely begin alike do not."""
        if not place.startswith(self.prefix):
            return False
        return self.prefix.endswith(("/", ":")) or place[len(self.prefix) :][:1] in ("", "/")

    def is_for(self, tenant: str) -> bool:
        """Whether a tenant's requests may name its sources."""
        return not self.tenants or tenant in self.tenants


def find_rule(rules: Sequence[ResolveRule], source: AskedSource, tenant: str) -> ResolveRule:
    """Return the first rule that lets a tenant name a source.

    Raises:
        AdapterNotFoundError: If this store resolves nothing.
        AdapterForbiddenError: If no rule does; the message does not tell rules of other tenants from none.
    """
    if not rules:
        raise AdapterNotFoundError(
            f"no adapter is named {source.text[:MAX_SHOWN]!r}, and this adapter store resolves no sources at request time (--resolve-from)",
            metadata={"adapter": source.text[:MAX_SHOWN]},
        )
    for rule in rules:
        if rule.covers(source.place) and rule.is_for(tenant):
            return rule
    raise AdapterForbiddenError(
        f"tenant {tenant!r} may not name {source.text[:MAX_SHOWN]!r}: it lies in no source that the operator allows this tenant to resolve "
        "at request time (--resolve-from)",
        metadata={"adapter": source.text[:MAX_SHOWN]},
    )
