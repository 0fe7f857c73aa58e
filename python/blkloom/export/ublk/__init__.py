"""Block devices of the kernel's ublk driver: their commands, endpoints and servers."""
