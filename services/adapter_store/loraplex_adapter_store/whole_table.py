"""The table of names as it is read anew, compared with the one before part by part, so that no step takes long."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.ids import DEFAULT_LABEL
from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from loraplex_adapter_store.records import AdapterRecord, AdapterView

_log = get_logger()


class WholeTable:
    """A table that is being read.

    Args:
        before: The table before, by name; it does not change meanwhile.
        base_fingerprints: Fingerprints of the base models known here.

    Attributes:
        views: What has been read, by name; what is as it was is the object that it was.
        names: Digest -> a name that has the revision.
        changed: What is not as it was.
    """

    def __init__(self, before: Mapping[str, AdapterView], base_fingerprints: Collection[str]) -> None:
        self._before = before
        self._base_fingerprints = base_fingerprints
        self._lost: list[str] = []
        self._strangers: list[str] = []
        self.views: dict[str, AdapterView] = {}
        self.names: dict[str, str] = {}
        self.changed: list[AdapterView] = []

    def add(self, part: Iterable[AdapterView]) -> None:
        """Add names that have been read."""
        for view in part:
            name, known = view.record.name, self._before.get(view.record.name)
            self.views[name] = known if known == view else view
            self.names.update(dict.fromkeys(view.record.revisions, name))
            if known != view:
                self.changed.append(view)
            if known is not None and _is_lost(known.record, view.record):
                self._lost.append(name)
            latest = view.revision(view.record.labels.get(DEFAULT_LABEL))
            if latest is not None and latest.base_fingerprint not in self._base_fingerprints:
                self._strangers.append(name)

    def lost(self) -> list[str]:
        """Return the names whose state before is no predecessor of the present one; call it once all has been added."""
        return [*self._lost, *(self._before.keys() - self.views.keys())]

    def report_strangers(self) -> None:
        """Log the adapters that no engine of these base models will take, before requests are refused for it."""
        if self._strangers:
            _log.warning(
                "adapters of base models unknown here; if one is an earlier state of a base model, import them again",
                num_adapters=len(self._strangers),
                names=self._strangers[:10],
            )


def _is_lost(told: AdapterRecord, now: AdapterRecord) -> bool:
    """Return whether a record that watchers were sent is not a predecessor of the present one."""
    return now.version < told.version or (now.version == told.version and now != told)
