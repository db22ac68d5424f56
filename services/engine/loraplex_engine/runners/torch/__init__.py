"""The torch backend: runs on any device that torch has, and is the oracle of the CUDA backend."""
