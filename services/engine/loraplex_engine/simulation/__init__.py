"""The engine in virtual time: its own scheduler, pool, prefix cache and adapter cache over a device that only costs time.

Nothing here imports torch. ``python -m loraplex_engine.simulation`` reads a question as JSON and prints the answer as
JSON; ``loraplex plan`` starts it (docs/adr/0016-simulator.md).
"""
