"""Devices: load, suspend, resume and close; the mapper thread for faults; the Python interfaces for I/O."""
