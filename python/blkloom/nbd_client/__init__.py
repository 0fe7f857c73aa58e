"""The client side of NBD: URIs, the handshake with a server, and the connections of an `_engine.NbdClient`."""
