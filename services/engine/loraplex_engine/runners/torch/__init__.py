"""The torch backend: any device torch has, and the oracle of the CUDA backend."""
