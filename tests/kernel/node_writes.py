"""Shell functions for the guests' scripts that write to a node while something happens to its server."""

from __future__ import annotations

NODE_WRITES = r"""
# write BLOCK COUNT: to $node, from /run/data. compare BLOCK COUNT: that it is there.
write() { dd if=/run/data of="$node" oflag=direct bs=4096 count="$2" seek="$1" status=none; }
compare() { dd if="$node" iflag=direct bs=4096 count="$2" skip="$1" status=none | cmp -n $((4096 * $2)) /run/data -; }
# begin COMMAND...: in the background; returns when $node has got a request of it. wait $writing ends it.
# Requests that were completed are counted, too: it may be over at once.
begin() {
    local before
    before=$(begun)
    "$@" & writing=$!
    until [ "$(begun)" -gt "$before" ]; do :; done
}
begun() { awk '{ print $5 + $9 }' "/sys/block/${node#/dev/}/stat"; }  # completed writes, and what is in flight
"""
