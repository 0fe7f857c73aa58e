"""Exports of devices: one package for each protocol, which gives the engine a connected descriptor."""
