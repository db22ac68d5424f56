"""The step loop: one thread that turns commands into steps and steps into outputs, and what it drives."""
