"""CUDA kernels of loraplex and their torch references."""
