"""What computes steps: one folder a backend, and what the backends share (drawing, probabilities, faults)."""
