"""Runs all parts of loraplex on this machine as child processes."""

from loraplex_client.serve.config import ServeConfig, default_data_dir
from loraplex_client.serve.ports import DEFAULT_BASE_PORT, MAX_NUM_ENGINES, PortError, assign_ports, require_free_ports
from loraplex_client.serve.shares import EngineShare, ShareError, Wanted, share_out, this_machine
from loraplex_client.serve.stack import ServeError, Stack
from loraplex_client.valkey_access import ValkeyAccess

__all__ = [
    "DEFAULT_BASE_PORT",
    "MAX_NUM_ENGINES",
    "EngineShare",
    "PortError",
    "ServeConfig",
    "ServeError",
    "ShareError",
    "Stack",
    "ValkeyAccess",
    "Wanted",
    "assign_ports",
    "default_data_dir",
    "require_free_ports",
    "share_out",
    "this_machine",
]
