"""Files whose blocks are mapped."""
