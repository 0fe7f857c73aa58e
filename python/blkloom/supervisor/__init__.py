"""The supervisor: the registry of one user's devices, and the processes that serve them."""
