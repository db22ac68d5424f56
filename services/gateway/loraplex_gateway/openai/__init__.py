"""The OpenAI-compatible HTTP face; it calls the same core as gRPC."""
