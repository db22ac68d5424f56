"""Takes adapters in: from a directory, from the hub, by upload."""
