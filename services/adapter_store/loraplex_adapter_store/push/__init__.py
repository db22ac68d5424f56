"""Tensors that a trainer pushes: received, stored, brought to engines, and only then made what labels mean."""
