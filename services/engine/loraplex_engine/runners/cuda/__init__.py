"""The CUDA backend: our kernels between cuBLAS products, decode steps replayed as graphs."""
