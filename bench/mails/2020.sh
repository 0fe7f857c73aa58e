#!/bin/bash
# The test of dm-qcow2 (Tkhai, posted to dm-devel in March 2022): libaio on a QCOW2 image whose clusters are allocated,
# against `qemu-nbd -c`. The fio command of the mail; `blkloom create --attach` is `dmsetup create`.
#
# Environment: DIR (for two images and a file of SIZE bytes), SIZE, JOBS, RUNTIME in seconds, BS, RW, VIA (how the devices
# are attached). Beside the mail's devices: a raw file attached in the same way, and a device that moves no data. Needs
# root, fio, qemu-utils and the kernel's NBD client (without the latter, qemu-nbd is left out).
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/measured.sh"
DIR=${DIR:-/var/tmp} SIZE=${SIZE:-$((4 << 30))} JOBS=${JOBS:-2} RUNTIME=${RUNTIME:-60} VIA=${VIA:-auto}
BS=${BS:-4K 64K 512K 1M 2M} RW=${RW:-read write}
export VIA

nodes=()
end() {
    for one in "${nodes[@]}"; do
        case $one in
        qcow2=*) blkloom remove mail-qcow2 ;;
        qemu-nbd=*) qemu-nbd -d "${one#*=}" >/dev/null ;;
        *) "$here/with.sh" ${one/=/ -d } ;;
        esac
    done
    rm -f "$DIR"/mails.{qcow2,qemu,raw}
}
trap end EXIT

for image in qcow2 qemu; do
    qemu-img create -q -f qcow2 -o preallocation=full "$DIR/mails.$image" "$SIZE"
done
written "$DIR/mails.raw" "$SIZE"
if modprobe -q nbd || [ -e /sys/block/nbd0 ]; then
    qemu-nbd -c /dev/nbd0 --aio=native --nocache "$DIR/mails.qemu"
    nodes+=(qemu-nbd=/dev/nbd0)
    until [ "$(blockdev --getsize64 /dev/nbd0)" = "$SIZE" ]; do :; done
else
    echo "no kernel NBD client: without qemu-nbd" >&2
fi
nodes+=("qcow2=$(blkloom create mail-qcow2 "$DIR/mails.qcow2" --attach --via "$VIA")")
for way in losetup blkloom zero; do
    nodes+=("$way=$("$here/with.sh" $way -f --show "$DIR/mails.raw")")
done

for bs in $BS; do
    for rw in $RW; do
        for one in "${nodes[@]}"; do
            name=${one%%=*}
            [ "$name" != qcow2 ] || name="blkloom qcow2"
            measured "$bs $rw, $JOBS jobs, qd 8: $name" \
                fio --name=test --ioengine=libaio --direct=1 --bs="$bs" --filename="${one#*=}" --readwrite="$rw" \
                --runtime="$RUNTIME" --numjobs="$JOBS" --iodepth=8 | grep -E '^---|IOPS'
        done
    done
done
