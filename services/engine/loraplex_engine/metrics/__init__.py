"""The metrics of one engine, as /metrics shows them."""
