#!/bin/bash
# Snapshots with a store in a file: first writes of chunks of their origin, and reads of chunks that have not changed, beside
# dm-snapshot; not from a mail.
#
# Environment: DIR (a tmpfs with room for four files of SIZE bytes), SIZE, RUNTIME in seconds, VIA. WAYS: dm-snapshot,
# blkloom. Needs root and fio; dmsetup for dm-snapshot.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/measured.sh"
DIR=${DIR:-/dev/shm} SIZE=${SIZE:-$((256 << 20))} RUNTIME=${RUNTIME:-1} VIA=${VIA:-auto} WAYS=${WAYS:-dm-snapshot blkloom}
sectors=$((SIZE / 512))

end() {
    case " ${made:-} " in *' dm-snapshot '*)
        dmsetup remove mail-origin
        dmsetup remove mail-before
        losetup -d "$disk"
        losetup -d "$store"
        ;;
    esac
    case " ${made:-} " in *' blkloom '*)
        blkloom snapshot mail-disk --delete
        blkloom remove mail-disk
        blkloom remove mail-plain
        ;;
    esac
    rm -f "$DIR"/mails.*
}
trap end EXIT

# run TEST DEVICE fio OPTION...
run() {
    measured "$1" fio --name=snapshot --ioengine=libaio --direct=1 --bs=4k --iodepth=16 --filename="$2" "${@:3}" |
        grep -E '^---|IOPS'
}

for way in $WAYS; do
    written "$DIR/mails.$way" "$SIZE"
    written "$DIR/mails.$way-plain" "$SIZE"
    truncate -s $((2 * SIZE)) "$DIR/mails.$way-store"
    case $way in
    dm-snapshot)
        disk=$(losetup -f --show --direct-io=on "$DIR/mails.$way")
        store=$(losetup -f --show --direct-io=on "$DIR/mails.$way-store")
        dmsetup create mail-before --table "0 $sectors snapshot $disk $store P 8"
        dmsetup create mail-origin --table "0 $sectors snapshot-origin $disk"
        made="${made:-} $way" origin=/dev/mapper/mail-origin before=/dev/mapper/mail-before plain=$disk
        ;;
    blkloom)
        rm "$DIR/mails.$way-store"
        origin=$(blkloom create mail-disk --table "0 $sectors loop $DIR/mails.$way" --attach --via "$VIA")
        plain=$(blkloom create mail-plain --table "0 $sectors loop $DIR/mails.$way-plain" --attach --via "$VIA")
        blkloom snapshot mail-disk mail-before --file "$DIR/mails.$way-store" --chunk 4k
        made="${made:-} $way" before=$(blkloom attach mail-before --via "$VIA")
        ;;
    *)
        echo "snapshot.sh: the way $way is unknown" >&2
        exit 2
        ;;
    esac
    reads=(--rw=randread --norandommap --time_based --runtime="$RUNTIME")
    run "4K reads of a device: $way" "$plain" "${reads[@]}"
    run "4K reads of its snapshot, nothing changed: $way" "$before" "${reads[@]}"
    run "4K writes, each the first of a chunk: $way" "$origin" --rw=write --size="$SIZE"
done
