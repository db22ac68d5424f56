"""Pushes adapters' page images into attached engines."""
