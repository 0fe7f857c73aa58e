"""Attaching devices: makes a node (a block device or a file) of a device, for mkfs, mount and other programs."""
