"""The engine's connections to other services: its RPCs and sessions, the adapter store, its lease in Valkey."""
