"""The scheduling and memory policies, each figure with its bound: a module per section of ``benchmarks/policies.py``."""
