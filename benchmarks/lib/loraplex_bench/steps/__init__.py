"""Single steps, layers and kernels: what ``calibrate.py``, ``profile_step.py``, ``layers.py`` and ``kernels.py`` time."""
