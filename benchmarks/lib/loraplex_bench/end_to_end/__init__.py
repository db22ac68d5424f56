"""The engine on whole workloads: the cases of ``benchmarks/engine.py``."""
