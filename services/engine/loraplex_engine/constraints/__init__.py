"""Constraints on outputs: what a structured output may look like, as masks of the tokens that may come next."""
