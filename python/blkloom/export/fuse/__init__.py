"""The FUSE export: a device as one regular file, for programs that open files."""
