"""Client library and command line of loraplex."""
