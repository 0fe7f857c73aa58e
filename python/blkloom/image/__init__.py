"""Disk images: chains of layers, their attachment to the engine's cluster table, and the path policy for names in
images.
"""
