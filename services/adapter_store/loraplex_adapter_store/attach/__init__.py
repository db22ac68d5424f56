"""How adapters get out: page images pushed into attached engines."""
