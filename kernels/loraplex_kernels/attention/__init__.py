"""Attention over paged keys and values, and the kernel that writes them."""
