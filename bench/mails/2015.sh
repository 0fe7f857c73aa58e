#!/bin/bash
# The test of "block: loop: support DIO & AIO" (Lei, August 2015): four jobs of fio with psync in ext4 on a loop device,
# its context switches and what the page cache grows to. The mail names the parameters of fio, not its commands;
# `losetup` is `blkloom loop`.
#
# Environment: DIR (for a file of SIZE bytes; in the mail, on an SSD), SIZE, DATA (bytes of each job's file), JOBS,
# RUNTIME in seconds (0: once over each file), RW. WAYS: of with.sh, each with the loop driver's I/O mode after a comma;
# unless given, losetup with both modes, and blkloom. Needs root, fio and e2fsprogs.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/measured.sh"
DIR=${DIR:-/var/tmp} SIZE=${SIZE:-$((8 << 30))} DATA=${DATA:-1500M} JOBS=${JOBS:-4} RUNTIME=${RUNTIME:-20}
RW=${RW:-randread read randwrite write} WAYS=${WAYS:-losetup,off losetup,on blkloom,off}

node='' is_mounted=''
work=$(mktemp -d /run/mails.XXXXXX)
ended() {
    [ -z "$is_mounted" ] || umount "$work"
    [ -z "$node" ] || "$here/with.sh" "${way%,*}" -d "$node"
    node='' is_mounted=''
}
end() {
    ended
    rmdir "$work"
    rm -f "$DIR/mails.image"
}
trap end EXIT

for way in $WAYS; do
    truncate -s "$SIZE" "$DIR/mails.image"
    mode=${way#*,}
    node=$("$here/with.sh" "${way%,*}" -f --show --direct-io="$mode" "$DIR/mails.image")
    mkfs.ext4 -qF "$node"
    mount "$node" "$work" && is_mounted=1
    limit=()
    [ "$RUNTIME" = 0 ] || limit=(--runtime="$RUNTIME")
    for rw in $RW; do
        sync -f "$work"
        drop_caches
        before=$(awk '/^ctxt/ {print $2}' /proc/stat)
        measured "$rw, $JOBS jobs, psync in ext4: $([ "$mode" = on ] && echo "${way%,*} direct" || echo "${way%,*}")" \
            fio --name=job --directory="$work" --bs=4k --ioengine=psync --numjobs="$JOBS" --size="$DATA" \
            --group_reporting "${limit[@]}" --rw="$rw" | grep -E '^---|IOPS'
        echo "    $(($(awk '/^ctxt/ {print $2}' /proc/stat) - before)) context switches;" \
            "$(awk '/^(Buffers|Cached):/ {print $1, $2, $3}' /proc/meminfo | tr '\n' ' ')"
    done
    ended
    rm "$DIR/mails.image"
done
