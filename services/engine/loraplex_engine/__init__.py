"""The data plane: token ids in, token ids out, on one GPU (or CPU) and one unified page pool."""
