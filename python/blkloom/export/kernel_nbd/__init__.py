"""Block devices of the kernel's NBD client: its messages, endpoints and servers."""
