"""Products with the base's weights that libraries are slow at."""
