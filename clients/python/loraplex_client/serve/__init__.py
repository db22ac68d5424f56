"""Runs all parts of loraplex on this machine as child processes."""

from loraplex_client.serve.config import ServeConfig, default_data_dir
from loraplex_client.serve.stack import ServeError, Stack

__all__ = ["ServeConfig", "ServeError", "Stack", "default_data_dir"]
