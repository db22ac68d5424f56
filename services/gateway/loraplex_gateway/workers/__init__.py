"""Several gateway processes on one pair of ports: the parent that keeps them, and how they talk to each other."""
