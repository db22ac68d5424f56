"""The ``loraplex`` command line."""

from loraplex_client.cli.app import main

__all__ = ["main"]
