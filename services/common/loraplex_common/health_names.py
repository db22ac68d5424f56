"""Names that every server answers health checks by; apart, so that a probe imports no server."""

from __future__ import annotations

from typing import Final

LIVENESS: Final = "liveness"
READINESS: Final = "readiness"
