"""dmsetup's ways, without I/O: names and their mangling, reports, trees, the words of its errors."""
