"""Tests of `blkloom copy`."""
