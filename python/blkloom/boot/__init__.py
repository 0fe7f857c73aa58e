"""Devices at boot: files that describe devices, made by `blkloom save`, from which `blkloom restore` makes them."""
