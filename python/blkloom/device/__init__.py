"""Devices: their life, the thread that answers their faults, and the ways Python code uses them."""
