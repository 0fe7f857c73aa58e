"""Copies of whole devices, files and images: the two ends, the run, and the journal that lets a run be continued."""
