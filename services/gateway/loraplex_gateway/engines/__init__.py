"""The engines: one link to each, kept in step with the registry, and the choice between them."""
