"""Compatibility with dmsetup, without I/O: name mangling, reports, trees, error messages."""
