"""What an earlier version left: bytes of its calls, its answers, its data; written by `support.earlier.record`."""
