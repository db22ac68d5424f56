"""Stacks for the tests of this folder, one of each kind per worker."""

from support.stack_fixtures import smol_stack, tiny_stack, tiny_world

__all__ = ["smol_stack", "tiny_stack", "tiny_world"]
