"""Tests of the loop target with `block_map`."""
