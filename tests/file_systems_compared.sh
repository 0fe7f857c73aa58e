# What file systems do on disks that fail, with the same words for dmsetup and for blkloom: the essence of xfstests'
# cases with dm-flakey, dm-error, dm-delay and dm-log-writes. Sourced with $W, a directory with room, behind
#   dm COMMAND...    dmsetup, or blkloom
#   backing FILE     how a table names a file: a loop device on it, or the file; released FILE ends that
#   attached         prints the node of the device "disk"
# Prints one line for each verdict.

set -euo pipefail
SECTORS=$((320 << 11))
MOUNTED=$W/mounted
mkdir "$MOUNTED"

said() { echo "$system: $*"; }
made() { if "$@" >"$W/printed" 2>&1; then echo yes; else echo no; fi; }
make_fs() {
    case $system in
    ext4) mkfs.ext4 -q -F -E nodiscard "$1" ;;
    xfs) mkfs.xfs -q -f -K "$1" ;;
    btrfs) mkfs.btrfs -q -f -K "$1" ;;
    esac
}
check_fs() {
    case $system in
    ext4) e2fsck -fn "$1" ;;
    xfs) xfs_repair -n "$1" ;;
    btrfs) btrfs check --readonly "$1" ;;
    esac
}
# Commits only when they are asked for.
mount_fs() {
    case $system in
    ext4 | btrfs) mount -t $system -o commit=3600 "$1" "$MOUNTED" ;;
    xfs) mount -t xfs "$1" "$MOUNTED" ;;
    esac
}
# table TABLE: another one under the file system, which is not asked. @ in it is the disk below.
table() {
    dm suspend --nolockfs disk
    dm load disk --table "0 $SECTORS ${1//@/"$disk"}"
    dm resume disk
}
new() {
    rm -f "$W/disk.img"
    truncate -s $((SECTORS * 512)) "$W/disk.img"
    disk=$(backing "$W/disk.img")
    dm create disk --table "0 $SECTORS ${1//@/"$disk"}"
    node=$(attached)
}
gone() {
    dm remove disk
    released "$W/disk.img"
}
# synced NAME...: whether an fsync of new files succeeds, through one descriptor and then again.
synced() {
    /usr/bin/python3 -E - "$@" <<'PYTHON'
import errno, os, sys
answers = []
for path in sys.argv[1:]:
    try:
        file = os.open(path, os.O_CREAT | os.O_WRONLY)
        os.write(file, b"x" * 300000)
    except OSError as error:
        answers.append(f"open or write {errno.errorcode[error.errno]}")
        continue
    for _ in range(2):
        try:
            os.fsync(file)
            answers.append("fsync done")
        except OSError as error:
            answers.append(f"fsync {errno.errorcode[error.errno]}")
print(", ".join(answers))
PYTHON
}

head -c 300000 /dev/zero | tr '\0' a >"$W/a"
for system in ${SYSTEMS:-ext4 xfs btrfs}; do
    # What was synced is there after a disk has dropped all later writes; the rest is not.
    new 'flakey @ 0 86400 0'
    make_fs "$node"
    mount_fs "$node"
    cp "$W/a" "$MOUNTED/synced"
    sync -f "$MOUNTED"
    cp "$W/a" "$MOUNTED/fsynced"
    sync "$MOUNTED/fsynced"
    cp "$W/a" "$MOUNTED/not-synced"
    table 'flakey @ 0 0 86400 1 drop_writes'
    umount "$MOUNTED"
    table 'flakey @ 0 86400 0'
    mount_fs "$node"
    said "drop_writes: synced $(made cmp "$W/a" "$MOUNTED/synced"), fsynced $(made cmp "$W/a" "$MOUNTED/fsynced")," \
        "not synced $(made cmp "$W/a" "$MOUNTED/not-synced")"
    umount "$MOUNTED"
    said "drop_writes: check $(made check_fs "$node")"

    # A disk that is slow.
    table 'delay @ 0 5 @ 0 20'
    mount_fs "$node"
    said "delay: $(synced "$MOUNTED/delayed")"

    # A disk that fails while it is mounted, and then is well.
    table error
    said "error: $(synced "$MOUNTED/first" "$MOUNTED/second")"
    said "error: read $(made cat "$MOUNTED/not-there")"
    umount "$MOUNTED"
    table 'linear @ 0'
    mount_fs "$node"
    said "error: synced $(made cmp "$W/a" "$MOUNTED/synced"), delayed $(made test -s "$MOUNTED/delayed")"
    umount "$MOUNTED"
    said "error: check $(made check_fs "$node")"

    # Only writes fail.
    table 'flakey @ 0 86400 0'
    mount_fs "$node"
    table 'flakey @ 0 0 86400 1 error_writes'
    said "error_writes: $(synced "$MOUNTED/third")"
    umount "$MOUNTED"
    table 'linear @ 0'
    said "error_writes: check after mount $(mount_fs "$node"; umount "$MOUNTED"; made check_fs "$node")"
    gone

    # Each recorded state has what was synced until then.
    rm -f "$W/log.img"
    truncate -s 256M "$W/log.img"
    log=$(backing "$W/log.img")
    new "log-writes @ $log"
    make_fs "$node"
    mount_fs "$node"
    for number in 1 2 3; do
        cp "$W/a" "$MOUNTED/$number"
        sync "$MOUNTED/$number"
        dm message disk 0 mark "after-$number"
    done
    umount "$MOUNTED"
    gone
    for number in 1 2 3; do
        rm -f "$W/copy.img"
        truncate -s $((SECTORS * 512)) "$W/copy.img"
        blkloom replay "$log" "$W/copy.img" --until "after-$number" >"$W/printed"
        copy=$(losetup -f --show "$W/copy.img")
        mount_fs "$copy"
        found=
        for one in 1 2 3; do found+="$(made cmp "$W/a" "$MOUNTED/$one") "; done
        umount "$MOUNTED"
        said "log-writes after $number: files ${found}check $(made check_fs "$copy")"
        losetup -d "$copy"
    done
    released "$W/log.img"
done
