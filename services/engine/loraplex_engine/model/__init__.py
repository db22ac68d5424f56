"""Decoders in torch: their weights, the linear layers they are made of, and the registry that picks one for a model."""
