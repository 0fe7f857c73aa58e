# The targets for tests, with the same words for dmsetup and for blkloom. See dmsetup_compared.sh; also
#   io NAME OPERATION...   see device_io.py
#   entries FILE           of a log of writes, up to the last mark
# The kernel takes marks of one word. A suspend, as before a removal, is a flush only with blkloom.

refused() { t dm create refused --table "$1"; }
at() { t io "$@"; }

echo "## unstriped"
t dm create one --table "0 2048 unstriped 2 16 1 $A 0"
t dm table one
t dm status one
t dm deps one
see one
at one "read 16 16" "write 16 16 7" "read 16 16"
t dm remove one
refused "0 2048 unstriped 2 16 3 $A 0"
refused "0 2048 unstriped 2 0 1 $A 0"
refused "0 2040 unstriped 2 16 1 $A 0"
refused "0 2048 unstriped 2 16 1 $A"

echo "## delay"
t dm create one --table "0 2048 delay $A 8 10"
t dm table one
t dm status one
at one "read 0 8" "write 0 8 7" "read 0 8" flush
t dm load one --table "0 2048 delay $A 0 0 $B 8 5"
t dm resume one
t dm table one
at one "read 0 8" "write 0 8 9" "read 0 8" flush
t dm load one --table "0 2048 delay $A 0 1 $B 0 2 $C 0 3"
t dm resume one
t dm table one
t dm status one
t dm deps one
at one "read 8 8" flush
t dm remove one
refused "0 2048 delay $A 0"
refused "0 2048 delay $A 0 1 $B 0"
refused "0 2048 delay $A 0 -1"
refused "0 2048 delay $A 0 1 $B 0 2 $C 0 3 4"

echo "## flakey"
for features in "" "1 drop_writes" "1 error_writes" "5 corrupt_bio_byte 1 r 170 0" "5 corrupt_bio_byte 3 w 170 0"; do
    t dm create one --table "0 2048 flakey $A 0 0 86400 $features"
    t dm table one
    t dm status one
    at one "read 0 8" "write 0 8 11" "read 0 8" "write 8 8 12" flush
    t dm suspend one
    t dm load one --table "0 2048 linear $A 0"
    t dm resume one
    at one "read 0 8" "read 8 8"
    t dm remove one
done
t dm create one --table "0 2048 flakey $A 0 86400 0"
t dm table one
at one "read 0 8" "write 0 8 5" "read 0 8"
t dm remove one
refused "0 2048 flakey $A 0 0 0"
refused "0 2048 flakey $A 0 1"
refused "0 2048 flakey $A 0 1 1 1 unknown"
refused "0 2048 flakey $A 0 1 1 2 drop_writes error_writes"
refused "0 2048 flakey $A 0 1 1 5 corrupt_bio_byte 0 r 1 0"
refused "0 2048 flakey $A 0 1 1 5 corrupt_bio_byte 1 x 1 0"
refused "0 2048 flakey $A 0 1 1 5 corrupt_bio_byte 1 r 256 0"

echo "## error"
t dm create one --table "0 8 error
8 8 linear $A 8"
t dm table one
t dm status one
at one "read 0 8" "write 0 8 1" "read 8 8" "write 8 8 3" "read 8 8" "read 0 16"
t dm remove one

echo "## log-writes"
dd if=/dev/zero of="$B" bs=64k count=32 conv=notrunc,fsync status=none
t dm create one --table "0 1024 log-writes $A $B"
t dm table one
t dm status one
at one "write 0 8 21" "write 16 16 22" flush
t dm message one 0 mark before
at one "write 8 8 23" "write 0 8 24" flush
t dm message one 0 mark after
t dm status one
t dm message one 0 unknown
t dm remove one
t entries "$B"
refused "0 1024 log-writes $A"
