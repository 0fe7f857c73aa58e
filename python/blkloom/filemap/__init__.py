"""Where a file's bytes are on its block device, and how that stays true while somebody relies on it.

`fiemap` reads the map, `ground` says whether it may be relied on, `lease` hears of everybody who asks for
the file, `immutable` keeps writers away even before that, `page_cache` forgets what the file system remembers
of it, `block_map` puts them together. `mappings` tells who has files in his memory.
"""
