"""Targets: the types of table segments. `spec` and `loaded` define the interface, `registry` lists the targets."""
