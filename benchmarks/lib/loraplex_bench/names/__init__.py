"""Very many names: a store and a gateway under calls that come at a steady rate."""
