"""Tensor-parallel groups: what several ranks need to compute as one engine."""
