"""How many tensor-parallel ranks an engine may have, and what their processes need of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraplex_common.adapter_image import TILE_ALIGN
from loraplex_common.image_geometry import ImageError

from loraplex_engine.config import ConfigError
from loraplex_engine.ranks.figures import RankBook

if TYPE_CHECKING:
    import torch
    from loraplex_common.base_model import BaseModelInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class RankHost:
    """What the processes of further ranks need of the engine's.

    Attributes:
        arena_fd: Memory file of the host arena, which has a part for each rank.
        on_lost: Called once, from any thread, with what happened when a rank ends or hangs.
        book: Takes what ranks say of themselves.
    """

    arena_fd: int
    on_lost: Callable[[str], None]
    book: RankBook = field(default_factory=RankBook)


def checked_degree(degree: int, info: BaseModelInfo, device: torch.device) -> int:
    """Return the number of ranks if so many can serve the model here.

    Raises:
        ConfigError: If not; the message says what is missing, and what would do.
    """
    if degree == 1:
        return degree
    if device.type != "cpu":
        raise ConfigError(
            f"--tensor-parallel {degree} computes on CPUs only: the CUDA backend computes a rank's part of a step, but has no runner "
            "for groups and no collectives between GPUs yet. Serve the model with one rank on each GPU, or give --device cpu"
        )
    try:
        info.geometry(dtype="float32", page_bytes=TILE_ALIGN, tp_degree=degree)
    except ImageError as error:
        raise ConfigError(f"--tensor-parallel {degree}: {error}") from error
    return degree


def for_each(degree: int) -> str:
    """Return which ranks have so many pages, for messages."""
    return f" for each of {degree} ranks" if degree > 1 else ""
