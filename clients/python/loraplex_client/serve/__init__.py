"""Runs all parts of loraplex on this machine as child processes."""

from loraplex_client.serve.config import ServeConfig, default_data_dir
from loraplex_client.serve.ports import DEFAULT_BASE_PORT, PortError, assign_ports, require_free_ports
from loraplex_client.serve.stack import ServeError, Stack
from loraplex_client.valkey_access import ValkeyAccess

__all__ = [
    "DEFAULT_BASE_PORT",
    "PortError",
    "ServeConfig",
    "ServeError",
    "Stack",
    "ValkeyAccess",
    "assign_ports",
    "default_data_dir",
    "require_free_ports",
]
