"""The page at /ui: what it is made of, and the events that it shows."""
