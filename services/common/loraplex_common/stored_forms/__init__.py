"""Forms in which quantised checkpoints store weights: what config.json says of them, without torch."""
