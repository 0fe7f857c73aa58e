"""Targets: what a table line names. `base` is the contract, `registry` the list of those there are."""
