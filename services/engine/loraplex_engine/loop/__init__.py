"""The step loop and what it drives: one thread that turns commands into steps, and steps into outputs."""
