"""Changes of a QCOW2 image while a device uses it.

The engine writes guest data by itself if its cluster table has a writable entry. All other writes reach the `Writer`
(writer.py) as faults. A write to an unallocated cluster takes these steps:

 1. write_classification.py determines what the write to each cluster needs; write_allocation.py executes that, or
    batch_allocation.py for several writes together.
 2. allocation.py allocates host clusters; preallocation.py adds neighbours of the write.
 3. The clusters are made to read as zeros, or cow.py fills them with the old data that the write does not cover.
 4. mapping.py changes the L2 table in memory, then stores the entries in the engine's cluster table.
 5. The handler answers RETRY. The engine looks up again, writes the guest's data to the new cluster, and answers the
    client. (If cow.py has written the guest's data, too, the handler completes the request.)
 6. A flush makes the write durable: the engine syncs the files; then flush.py writes refcounts, L2 tables and L1 table,
    with a sync after each.

Before the first change, writer.py marks the image dirty (lazy refcounts) and its dirty bitmaps in use. After that, a
write changes metadata only in memory, until a flush, or until too many changed tables are in memory. flush.py has the
order and the proof that the image is consistent after a crash at any time. discard.py handles discards and zeros.
background_check.py and recount.py read all tables while requests are served, and correct the refcounts.
"""
