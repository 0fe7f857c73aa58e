"""Partition tables as the kernel reads them, from bytes: MBR with logical partitions, and GPT."""

from blkloom.partitions.found import Disk, Partition, PartitionTable
from blkloom.partitions.scanning import find_partitions

__all__ = ["Disk", "Partition", "PartitionTable", "find_partitions"]
