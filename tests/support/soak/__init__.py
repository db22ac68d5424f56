"""A fleet of real processes under random faults, and clients that check every answer: ``python -m support.soak``.

`fleet` has the processes, `truth` what each answer must be, `clients` those who ask, `catalogue` those who change names,
`faults` and `abuse` what is done to the fleet, `director` when, `memory` what processes hold, `report` what came of it.
"""
