#!/bin/bash
# The test script of "dm: add new loop and ram targets" (Mauelshagen, dm-devel, January 2018): random 4K and 32K requests
# of 99 jobs to the loop driver, the loop target and the ram target. Its commands, but `blkloom` for `dmsetup`.
#
# Environment: DIR (a tmpfs with room for two files of SIZE bytes), SIZE, JOBS, RUNTIME in seconds, VIA (how the devices
# are attached). ALSO: further ways of with.sh, on a file like that of the loop driver. Needs root and fio.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source "$here/measured.sh"
DIR=${DIR:-/dev/shm} SIZE=${SIZE:-$((2 << 30))} JOBS=${JOBS:-99} RUNTIME=${RUNTIME:-3} VIA=${VIA:-auto} ALSO=${ALSO:-}

end() {
    [ -z "${driver:-}" ] || losetup -d "$driver"
    for name in mail-loop0 mail-ram; do ! blkloom info "$name" >/dev/null 2>&1 || blkloom remove "$name"; done
    for one in "${also[@]}"; do "$here/with.sh" ${one/=/ -d }; done
    rm -f "$DIR"/{loop0,mapper_loop0,also}
}
also=()
trap end EXIT

for f in loop0 mapper_loop0; do written "$DIR/$f" "$SIZE"; done
driver=$(losetup -f --show "$DIR/loop0")
# As in the mail: KiB as sectors, so half of the file.
sectors=$(du -s "$DIR/mapper_loop0" | cut -f1)
loop=$(blkloom create mail-loop0 --table "0 $sectors loop $DIR/mapper_loop0" --attach --via "$VIA")
ram=$(blkloom create mail-ram --table "0 $sectors ram" --attach --via "$VIA")
devices=("losetup=$driver" "blkloom loop=$loop" "blkloom ram=$ram")
for way in $ALSO; do
    written "$DIR/also" $((sectors * 512))
    also+=("$way=$("$here/with.sh" "$way" -f --show "$DIR/also")")
    devices+=("${also[-1]}")
done

for bs in 4K 32K; do
    for d in "${devices[@]}"; do
        drop_caches
        measured "$bs randrw, $JOBS jobs, qd 12: ${d%=*}" \
            fio --bs=$bs --rw=randrw --numjobs="$JOBS" --group_reporting --iodepth=12 --runtime="$RUNTIME" \
            --ioengine=libaio --loops=1 --direct=1 --exitall --name dc --filename="${d##*=}" |
            grep -E '^---|read|write'
    done
done
