"""Sampling on the device, and its fp32 oracle."""
