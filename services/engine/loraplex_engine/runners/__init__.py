"""Backends that compute steps, one folder each, and what they share (drawing, probabilities, faults)."""
