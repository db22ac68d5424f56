"""A command line against doubles, for the tests of this folder."""

from support.cli_runner import directory, fleet, gateway, loraplex, store

__all__ = ["directory", "fleet", "gateway", "loraplex", "store"]
