#!/bin/bash
# Makes a block device of a file in one of several ways, with the options of losetup:
#
#     with.sh WAY -f --show [--direct-io=on|off] FILE    prints the node
#     with.sh WAY -d NODE
#
# WAY: losetup; dm-linear, a linear device of device-mapper on a loop device; qemu-nbd, with the kernel's NBD client;
# blkloom, attached by VIA (ublk, nbd, loop; the best one unless given); zero, a device of blkloom that is attached in
# the same way and moves no data. Needs root.
set -euo pipefail
way=$1
shift

attached() { # TABLE: the node of a new device of blkloom
    blkloom create "mail-$BASHPID" --table "$1" --attach --via "${VIA:-auto}"
}

if [ "$1" = -d ]; then
    case $way in
    losetup) losetup -d "$2" ;;
    dm-linear)
        # MAJOR:MINOR of the loop device. Only udev makes /dev/block.
        below=$(readlink "/sys/dev/block/$(dmsetup table "$2" | cut -d ' ' -f 4)")
        dmsetup remove "$2"
        losetup -d "/dev/${below##*/}"
        ;;
    qemu-nbd) qemu-nbd -d "$2" ;;
    blkloom | zero) blkloom remove "$2" ;;
    esac
    exit
fi

file=${!#}
direct=
[[ " $* " != *' --direct-io=on '* ]] || direct=' 0 1 direct_io'
sectors=$(($(stat --format=%s "$file") / 512))
case $way in
losetup) losetup "$@" ;;
dm-linear)
    below=$(losetup "$@")
    dmsetup create "mail-${below##*/}" --table "0 $sectors linear $below 0"
    echo "/dev/mapper/mail-${below##*/}"
    ;;
qemu-nbd)
    # The first that has no client.
    for node in /sys/block/nbd*; do [ -e "$node/pid" ] || break; done
    node=/dev/${node##*/}
    qemu-nbd -c "$node" -f raw ${direct:+--nocache --aio=native} "$file"
    # It returns before the kernel's client is there.
    until [ "$(blockdev --getsz "$node")" = "$sectors" ]; do :; done
    echo "$node"
    ;;
blkloom) attached "0 $sectors loop $file$direct" ;;
zero) attached "0 $sectors zero" ;;
*)
    echo "with.sh: the way $way is unknown" >&2
    exit 2
    ;;
esac
