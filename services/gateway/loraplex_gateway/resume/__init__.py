"""Resume tokens: what seals them and what they say."""
