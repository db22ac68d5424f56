"""What generation_config.json says about when outputs end; its sampling defaults are the gateway's business."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def read_eos_token_ids(directory: Path) -> tuple[int, ...]:
    """Return a base model's end-of-text ids: generation_config.json's, else config.json's; often a list.

    Raises:
        ValueError: If a file is no JSON or an id is no integer.
    """
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.exists():
            continue
        config: dict[str, Any] = json.loads(file.read_text())
        eos = config.get("eos_token_id")
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        if not all(type(token_id) is int for token_id in ids):
            raise ValueError(f"{file}: eos_token_id {eos!r} is not an integer or a list of integers")
        return tuple(dict.fromkeys(ids))
    return ()
