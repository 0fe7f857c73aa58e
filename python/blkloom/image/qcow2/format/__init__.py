"""Codecs of a QCOW2 image: bytes to values and back. Pure, except for reads."""
