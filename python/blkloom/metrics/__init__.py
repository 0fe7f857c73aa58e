"""Metrics of devices: samples, rates between two samples, and output formats. Pure."""
