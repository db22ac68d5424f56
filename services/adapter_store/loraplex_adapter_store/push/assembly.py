"""Builds what takes pushes in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_adapter_store.push.pusher import Pusher
from loraplex_adapter_store.push.readiness import EngineReadiness
from loraplex_adapter_store.push.released import ReleasedRevisions

if TYPE_CHECKING:
    from loraplex_adapter_store.attach.attached import AttachedEngines
    from loraplex_adapter_store.core import Core
    from loraplex_adapter_store.hints import Hints
    from loraplex_adapter_store.imports.importer import Importer
    from loraplex_adapter_store.imports.intake import Intake


def make_pusher(core: Core, intake: Intake, importer: Importer, attached: AttachedEngines, hints: Hints) -> Pusher:
    """Return what takes the pushes of a store in."""
    return Pusher(
        intake,
        importer,
        core.catalog,
        EngineReadiness(attached, core.holdings),
        forget=ReleasedRevisions(core.client, hints).forget,
        num_kept=core.config.keep_pushed_revisions,
    )
