"""Signatures of adapters' files (OpenSSF model signing): what is trusted, and whether files are signed by it."""
