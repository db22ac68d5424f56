"""`push` without a client of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraplex_client._sync.client import Client

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from loraplex_client._push_messages import Config
    from loraplex_client.resources import PushResult


def push(
    name: str,
    state_dict: Mapping[str, Any],
    config: Config,
    *,
    label: str = "",
    expected: str | None = None,
    store_target: str | None = None,
    api_key: str | None = None,
    profile: Path | None = None,
) -> PushResult:
    """Send an adapter that this process has in memory, over a connection of its own.

    Args:
        name: Name to store it under.
        state_dict: Name -> tensor; see `Adapters.push`, also for the other arguments and what is raised.
        config: PEFT's ``LoraConfig``, or ``adapter_config.json``.
        label: Label to move besides ``latest``.
        expected: The revision that the label must point at.
        store_target: The adapter store, as `Client` takes it.
        api_key: As `Client` takes it.
        profile: As `Client` takes it.
    """
    with Client(store_target=store_target, api_key=api_key, profile=profile) as client:
        return client.adapters.push(name, state_dict, config, label=label, expected=expected)
