"""Keeps adapters in Valkey and host RAM, and pushes their page images into engines."""
