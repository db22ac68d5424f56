"""A fleet of real processes under random faults, and clients that check every answer: ``python -m support.soak``.

`fleet` has the processes, `truth` the right answers, `clients` the clients that ask, `catalogue` the one that changes
names, `faults` and `abuse` the disturbances, `director` their times, `memory` the processes' memory, `report` the
results.
"""
