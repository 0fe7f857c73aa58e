"""Parsers of partition tables, with the rules of the kernel: MBR with logical partitions, and GPT."""

from blkloom.partitions.found import Disk, Partition, PartitionTable
from blkloom.partitions.gpt import block_size_of
from blkloom.partitions.scanning import find_partitions

__all__ = ["Disk", "Partition", "PartitionTable", "block_size_of", "find_partitions"]
