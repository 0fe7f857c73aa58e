"""The control plane: run directory, messages, channels that carry descriptors, and the client."""
