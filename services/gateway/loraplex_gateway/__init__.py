"""The control plane: text in, text out; routes each request to an engine that serves its adapter."""
