"""The ways in to a device: one package a protocol, each ending with a ready descriptor for the engine."""
