"""The QCOW2 format: header, tables, allocation, and the order of writes. Source: QEMU docs/interop/qcow2."""
