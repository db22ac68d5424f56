"""Brings a store to what a file says of its adapters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_common.errors import AdapterNotFoundError, InvalidParameterError
from loraplex_common.ids import find_revision

from loraplex_client.adapter_manifest import HUB_SOURCE
from loraplex_client.resources import Adapter, AdapterState

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Sequence

    from loraplex_client._sync.adapters import Adapters
    from loraplex_client.adapter_manifest import Pointer, WantedAdapter


class Applier:
    """Applies adapters one by one; done twice, the second time changes nothing.

    Args:
        adapters: The store's adapters.
        say: Called with each step, for people to read.
        is_dry: Say what would be done, and do nothing. Whether a directory holds anything new shows only when it is sent.
        prunes: Delete adapters that are not wanted, and of those that are the labels that are not.
    """

    def __init__(self, adapters: Adapters, say: Callable[[str], None], *, is_dry: bool, prunes: bool) -> None:
        self._adapters = adapters
        self._say = say
        self._is_dry = is_dry
        self._prunes = prunes

    def apply(self, wanted: Sequence[WantedAdapter]) -> int:
        """Apply all; return the number of steps.

        Raises:
            InvalidParameterError: If everything would be pruned.
            LoraplexError: What the store says of the first step that fails; what was applied before stays.
        """
        if self._prunes and not wanted:
            raise InvalidParameterError("the file names no adapter: all would be deleted", field="file")
        num_steps = sum(self._one(each) for each in wanted)
        if self._prunes:
            names = {each.name for each in wanted}
            for adapter in list(self._adapters.list()):
                if adapter.name not in names:
                    num_steps += self._step(f"{adapter.name}: delete", partial(self._adapters.delete, adapter.name))
        return num_steps

    def _one(self, wanted: WantedAdapter) -> int:
        known = self._known(wanted.name)
        num_steps = self._fields(wanted, known)
        num_steps += self._source(wanted, known)
        now = known if self._is_dry else self._known(wanted.name)
        for label, to in (wanted.labels or {}).items():
            num_steps += self._label(wanted.name, label, to, now)
        if self._prunes and now is not None and wanted.labels is not None:
            for label in sorted(now.aliases.keys() - wanted.labels.keys() - {"latest"}):
                num_steps += self._step(
                    f"{wanted.name}: remove label {label}",
                    partial(self._adapters.alias, wanted.name, label, ""),
                )
        return num_steps

    def _known(self, name: str) -> Adapter | None:
        found = [each for each in self._adapters.list(prefix=name) if each.name == name]
        return found[0] if found and found[0].state is not AdapterState.DELETED else None

    def _fields(self, wanted: WantedAdapter, known: Adapter | None) -> int:
        """Set the tenants before the adapter has anything that a request could use."""
        description, tenants = wanted.description, wanted.tenants
        if known is None:
            text = f"{wanted.name}: create" + (f", for {', '.join(tenants)}" if tenants else "")
            return self._step(
                text,
                lambda: self._adapters.create(
                    wanted.name, description=description or "", allowed_tenants=tenants or ()
                ),
            )
        new_description = description if description not in (None, known.description) else None
        new_tenants = tenants if tenants is not None and set(tenants) != set(known.allowed_tenants) else None
        if new_description is None and new_tenants is None:
            return 0
        told = [] if new_tenants is None else [f"for {', '.join(new_tenants) or 'all tenants'}"]
        told += [] if new_description is None else ["description"]
        return self._step(
            f"{wanted.name}: update {', '.join(told)}",
            lambda: self._adapters.update(
                wanted.name, description=new_description, allowed_tenants=new_tenants, etag=known.etag
            ),
        )

    def _source(self, wanted: WantedAdapter, known: Adapter | None) -> int:
        source, latest = wanted.source, known.latest if known is not None else None
        if source is None:
            return 0
        others = known.counterparts.get(latest.digest, {}) if known is not None and latest is not None else {}
        serves_wanted = others.keys() == set(wanted.also_base_models)
        if (hub := HUB_SOURCE.fullmatch(source)) is not None:
            if latest is not None and latest.source == _as_the_store_says(hub) and serves_wanted:
                return 0
            return self._step(
                f"{wanted.name}: import {source}",
                lambda: self._adapters.import_hub(
                    wanted.name,
                    hub["repo"],
                    revision=hub["revision"].lower(),
                    subfolder=hub["subfolder"] or "",
                    base_model=wanted.base_model,
                    also_base_models=wanted.also_base_models,
                ),
            )
        if self._is_dry:
            return self._step(f"{wanted.name}: import {source}, if it holds anything new", lambda: None)
        uploaded = self._adapters.upload(
            wanted.name,
            Path(source),
            stage=True,
            base_model=wanted.base_model,
            also_base_models=wanted.also_base_models,
        )
        staged = uploaded.revision.digest
        if latest is not None and latest.digest == staged:
            if serves_wanted:
                return 0
            return self._step(
                f"{wanted.name}: serve on {', '.join(wanted.also_base_models) or 'its own base'}", lambda: None
            )
        return self._step(
            f"{wanted.name}: import {source}, latest -> {staged[:12]}",
            lambda: self._adapters.alias(wanted.name, "latest", staged),
        )

    def _label(self, name: str, label: str, to: Pointer, now: Adapter | None) -> int:
        if now is None or ("latest" not in now.aliases and self._is_dry):
            return self._step(f"{name}: label {label}", lambda: None)
        wanted = {to: 1} if isinstance(to, str) else to
        shares: dict[str, int] = {}
        for text, weight in wanted.items():
            digest = self._digest(now, text)
            if digest in shares:
                raise InvalidParameterError(f"{name}: label {label}: {text} is named twice", field="file")
            shares[digest] = weight
        current = now.shares.get(label) or ({now.aliases[label]: 1} if label in now.aliases else {})
        if current == shares or (len(shares) == 1 and current.keys() == shares.keys()):
            return 0
        said = ", ".join(
            f"{digest[:12]} {weight}" if len(shares) > 1 else digest[:12] for digest, weight in shares.items()
        )
        target = shares if len(shares) > 1 else next(iter(shares))
        return self._step(f"{name}: label {label} -> {said}", lambda: self._adapters.alias(name, label, target))

    def _digest(self, now: Adapter, text: str) -> str:
        if text in now.aliases:
            return now.aliases[text]
        digest = find_revision(text, (each.digest for each in self._adapters.revisions(now.name)))
        if digest is None:
            raise AdapterNotFoundError(f"adapter {now.name} has no label and no revision {text!r}")
        return digest

    def _step(self, text: str, act: Callable[[], object]) -> int:
        self._say(text)
        if not self._is_dry:
            act()
        return 1


def _as_the_store_says(hub: re.Match[str]) -> str:
    """Return a hub source as a revision's ``source`` has it: the folder stands last."""
    folder = f"/{hub['subfolder']}" if hub["subfolder"] else ""
    return f"hf:{hub['repo']}@{hub['revision'].lower()}{folder}"
