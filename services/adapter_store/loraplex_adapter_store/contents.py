"""What is read of revisions, for the servicer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from loraplex_adapter_store.downloads import Downloads
    from loraplex_adapter_store.reports import Reports
    from loraplex_adapter_store.revisions import RevisionFinder


class Contents(NamedTuple):
    """Finds revisions, reads what they hold, and measures them."""

    revisions: RevisionFinder
    downloads: Downloads
    reports: Reports
