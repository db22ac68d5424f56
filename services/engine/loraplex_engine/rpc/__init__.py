"""The engine towards others: its RPCs and sessions, its line to the adapter store, its lease in Valkey."""
