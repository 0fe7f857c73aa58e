"""The supervisor: the registry of one user's devices, and the keeper of their workers."""
