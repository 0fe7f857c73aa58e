"""Block maps: where the bytes of a file are on its block device, and how that stays true while a device uses it.

`fiemap` reads the extents. `mappability` checks whether they may be used. `lease` notices when another process opens
the file, and `immutable` refuses writers before that. `page_cache` drops the pages of the file. `block_map` combines
these. `mappings` lists the files that processes have mapped into memory.
"""
