"""The QCOW2 format: header, tables, allocation, the order of what is written. Source: QEMU docs/interop/qcow2."""
