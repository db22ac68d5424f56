"""Finds the names that clients write for a digest, for metrics.

Routers compare the ``model`` of a request with the adapters that an engine lists, so metrics list names; all other code
behind the gateway knows adapters by digest alone.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from loraplex_common.alias_feed import SLICE_NAMES, in_slices
from loraplex_common.exposition import private
from loraplex_common.ids import DEFAULT_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from loraplex_common.alias_feed import AdapterEntry

MAX_LISTED_NAMES: Final = 512
MAX_LISTED_BYTES: Final = 32 * 1024


class AdapterNames:
    """Every name under which a digest can be asked for: ``name`` where ``latest`` points, ``name:label`` elsewhere.

    Names of restricted adapters are `private`. The class is an `AliasTable`.

    Attributes:
        changed_at: Unix time of the last change.
    """

    def __init__(self) -> None:
        self.changed_at = 0.0
        self._names: dict[str, dict[str, str]] = defaultdict(dict)  # digest -> name with label -> value in metrics
        self._digests: dict[str, tuple[str, ...]] = {}  # adapter -> digests that its labels point at

    def of(self, digest: str) -> list[str]:
        """Return the names of a digest as label values, in order; empty if no name points at it."""
        return sorted(self._names[digest].values()) if digest in self._names else []

    def listed(self, digests: Iterable[str]) -> list[str]:
        """Return the names of several digests, as many as fit `MAX_LISTED_NAMES` and `MAX_LISTED_BYTES`.

        Args:
            digests: The digests, most important first; names that do not fit are left out from the end.
        """
        names: list[str] = []
        num_bytes = 0
        for name in dict.fromkeys(name for digest in digests for name in self.of(digest)):
            num_bytes += len(name.encode()) + 1
            if len(names) == MAX_LISTED_NAMES or num_bytes > MAX_LISTED_BYTES:
                break
            names.append(name)
        return names

    def replace_all(self, entries: Iterable[AdapterEntry]) -> None:
        """Forget everything and take over a whole table, at once."""
        for _ in self.replacing(entries):
            pass

    def replacing(self, entries: Iterable[AdapterEntry]) -> Iterator[None]:
        """Take over a whole table, some hundred names at each step; the names of before are told until the last."""
        fresh = AdapterNames()
        for part in in_slices(entries):
            fresh.update(part)
            yield
        before, self._names, self._digests = self._names, fresh._names, fresh._digests
        self.changed_at = time.time()
        while before:  # to give back a hundred thousand at once takes tens of milliseconds
            for digest in tuple(itertools.islice(before, SLICE_NAMES)):
                del before[digest]
            yield

    def update(self, entries: Iterable[AdapterEntry]) -> None:
        """Take over the present state of several names."""
        self.changed_at = time.time()
        for entry in entries:
            self._forget(entry.name)
            if entry.is_deleted or not entry.labels:
                continue
            show = private if entry.allowed_tenants else str
            for label, digest in entry.labels.items():
                name = entry.name if label == DEFAULT_LABEL else f"{entry.name}:{label}"
                self._names[digest][name] = show(name)
            self._digests[entry.name] = tuple(set(entry.labels.values()))

    def _forget(self, adapter: str) -> None:
        for digest in self._digests.pop(adapter, ()):
            names = self._names[digest]
            for name in [name for name in names if name.partition(":")[0] == adapter]:
                del names[name]
            if not names:
                del self._names[digest]
