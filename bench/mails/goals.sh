#!/bin/bash
# Random 4K requests, 16 at a time, to a file in the ways that the speed goals of `blkloom attach` compare; not from a mail.
#
# Environment: DIR (a tmpfs with room for a file of SIZE bytes for each way), SIZE, RUNTIME in seconds, RW, VIA, ROUNDS (one
# after the other, each with all devices). WAYS: of with.sh, and qcow2, qemu-nbd-qcow2. Needs root, fio and qemu-utils; dmsetup and the kernel's NBD client for some ways.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/measured.sh"
DIR=${DIR:-/dev/shm} SIZE=${SIZE:-$((256 << 20))} RUNTIME=${RUNTIME:-1} RW=${RW:-randrw} VIA=${VIA:-auto}
WAYS=${WAYS:-losetup blkloom qcow2 zero} ROUNDS=${ROUNDS:-1}
export VIA

nodes=()
end() {
    for one in "${nodes[@]}"; do
        case $one in
        qcow2=*) blkloom remove mail-qcow2 ;;
        qemu-nbd-qcow2=*) qemu-nbd -d "${one#*=}" >/dev/null ;;
        *) "$here/with.sh" ${one/=/ -d } >/dev/null ;;
        esac
    done
    rm -f "$DIR"/mails.*
}
trap end EXIT

for way in $WAYS; do
    file=$DIR/mails.$way
    if [[ $way = *qcow2 ]]; then
        qemu-img create -q -f qcow2 -o preallocation=full "$file" "$SIZE"
    else
        written "$file" "$SIZE"
    fi
    case $way in
    qcow2) nodes+=("$way=$(blkloom create mail-qcow2 "$file" --attach --via "$VIA")") ;;
    qemu-nbd-qcow2)
        qemu-nbd -c /dev/nbd15 --aio=native --nocache "$file"
        nodes+=("$way=/dev/nbd15")
        until [ "$(blockdev --getsize64 /dev/nbd15)" = "$SIZE" ]; do :; done
        ;;
    # Each in its best mode: blkloom reads and writes the page cache without a wait.
    blkloom | zero) nodes+=("$way=$("$here/with.sh" "$way" -f --show "$file")") ;;
    *) nodes+=("$way=$("$here/with.sh" "$way" -f --show --direct-io=on "$file")") ;;
    esac
done

for rw in $(for round in $(seq "$ROUNDS"); do echo "$RW"; done); do
    for one in "${nodes[@]}"; do
        measured "4K $rw, qd 16: ${one%%=*}" \
            fio --name=goal --ioengine=libaio --direct=1 --bs=4k --rw="$rw" --iodepth=16 --norandommap --time_based \
            --runtime="$RUNTIME" --filename="${one#*=}" | grep -E '^---|IOPS'
    done
done
