"""What a tensor-parallel group takes for its steps, and what the hardware allows."""
