"""Adapters on one engine: each one's state and worth, which is evicted first, and the host memory of their images."""
