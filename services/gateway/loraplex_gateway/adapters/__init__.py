"""Adapters as the gateway knows them: names, close names for refusals, prefetch hints."""
