"""What a worker is told by its parent."""

from __future__ import annotations

import uuid
from pathlib import Path

import msgspec


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's place among its siblings.

    Attributes:
        gateway_id: The worker, as engines and claims know it.
        port: gRPC port that all workers share.
        http_port: HTTP port that all workers share.
        metrics_port: Where the parent shows the metrics of all.
        folder: Where each worker's control socket is; only this user may enter.
        models: Directories of the base models; flags may name them on a hub, where a branch may move.
        served_model_name: As the flag.
    """

    gateway_id: str
    port: int
    http_port: int
    metrics_port: int
    folder: str
    models: tuple[str, ...]
    served_model_name: str | None

    @property
    def control(self) -> Path:
        """This worker's control socket."""
        return control_path(self.folder, self.gateway_id)

    @property
    def siblings(self) -> list[Path]:
        """The control sockets of the other workers; one that was killed may have left its own."""
        return [path for path in Path(self.folder).glob("*.sock") if path != self.control]


def new_gateway_id() -> str:
    """Return the id of a gateway process that starts now."""
    return f"gateway-{uuid.uuid4().hex[:12]}"


def control_path(folder: str, gateway_id: str) -> Path:
    """Return where a worker listens for its parent and its siblings."""
    return Path(folder, f"{gateway_id}.sock")
