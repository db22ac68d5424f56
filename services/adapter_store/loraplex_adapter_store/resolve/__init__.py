"""Adapters that requests name by their source: allowed, pinned, imported once, and deleted when they are not used."""
