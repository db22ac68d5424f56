"""Adapters on one engine: where each stands, what it is worth, which leaves first, and the host memory of their images."""
