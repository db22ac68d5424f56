"""Kernels that read one row at a time: embedding, RMSNorm, SiLU."""
