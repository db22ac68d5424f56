"""How adapters get in: from a directory, from the hub, by upload."""
