"""What /metrics says of one engine."""
