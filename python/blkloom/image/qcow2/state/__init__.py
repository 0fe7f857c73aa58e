"""Metadata of one open QCOW2 image in memory: tables, refcounts, bitmaps, and their checks."""
