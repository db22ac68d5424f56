"""Decides which requests run, what the next step computes, and what its result means; accounting only, no device."""
