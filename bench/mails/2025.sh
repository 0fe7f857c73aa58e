#!/bin/bash
# The test of dm-loop (Patocka, linux-fsdevel, 7 March 2025): ext4 and xfs in a device on a file on ext4 and xfs, 12 jobs
# that read and write 4K one after the other, synchronously and asynchronously. The fio commands of the mail; `losetup`
# is `blkloom loop`. The mail does not show how the file systems were made.
#
# Environment: DISK, a block device that is OVERWRITTEN (in the mail, an NVMe drive); unless given, a loop device on a
# file in DIR. SIZE (of the device in the middle), DATA (of the file in it), JOBS, RUNTIME in seconds, FS (the file
# systems). WAYS: of with.sh; unless given, losetup and blkloom. Needs root, fio, e2fsprogs and xfsprogs.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/measured.sh"
DIR=${DIR:-/var/tmp} SIZE=${SIZE:-$((1 << 30))} DATA=${DATA:-$((512 << 20))} JOBS=${JOBS:-12} RUNTIME=${RUNTIME:-10}
FS=${FS:-ext4 xfs} WAYS=${WAYS:-losetup blkloom}
# mkfs.xfs otherwise refuses file systems of less than 300 MiB.
export TEST_DIR=1 TEST_DEV=1 QA_CHECK_FS=1

mounted=() node='' disk=''
work=$(mktemp -d /run/mails.XXXXXX)
mkdir "$work/test1" "$work/test2"
ended() {
    [ -z "${mounted[1]:-}" ] || umount "${mounted[1]}"
    [ -z "$node" ] || "$here/with.sh" "$way" -d "$node"
    [ -z "${mounted[0]:-}" ] || umount "${mounted[0]}"
    mounted=() node=''
}
end() {
    ended
    [ -z "$disk" ] || losetup -d "$disk"
    rm -rf "$DIR/mails.disk" "$work"
}
trap end EXIT

if [ -z "${DISK:-}" ]; then
    written "$DIR/mails.disk" $((SIZE + (256 << 20)))
    disk=$(losetup -f --show --direct-io=on "$DIR/mails.disk")
    DISK=$disk
fi
made() { case $1 in ext4) mkfs.ext4 -qF "$2" ;; *) "mkfs.$1" -qf "$2" ;; esac; }

fio_as() { # LAYERS NAME FILE
    measured "4K rw, $JOBS jobs, psync$1: $2" \
        fio --direct=1 --bs=4k --runtime="$RUNTIME" --time_based --numjobs="$JOBS" --ioengine=psync --iodepth=1 \
        --group_reporting=1 --filename="$3" -name=job --rw=rw | grep -E '^---|READ|WRITE'
    measured "4K rw, $JOBS jobs, libaio, qd 16$1: $2" \
        fio --direct=1 --bs=4k --runtime="$RUNTIME" --time_based --numjobs="$JOBS" --ioengine=libaio --iodepth=16 \
        --group_reporting=1 --filename="$3" -name=job --rw=rw | grep -E '^---|READ|WRITE'
}

fio_as "" "raw block device" "$DISK"
for fs in $FS; do
    for way in $WAYS; do
        made "$fs" "$DISK"
        mount "$DISK" "$work/test1" && mounted+=("$work/test1")
        written "$work/test1/l" "$SIZE"
        node=$("$here/with.sh" "$way" -f --show --direct-io=on "$work/test1/l")
        made "$fs" "$node"
        mount "$node" "$work/test2" && mounted+=("$work/test2")
        written "$work/test2/l" "$DATA"
        fio_as ", $fs in the device on $fs" "$way" "$work/test2/l"
        ended
    done
done
