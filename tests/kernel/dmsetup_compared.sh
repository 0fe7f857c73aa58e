# The same words for dmsetup in a kernel and for blkloom. Sourced by test_dmsetup_compared.py behind a
# prelude of either side, which sets
#   DM         dmsetup, or blkloom
#   A B C      three legs of 2 MiB: loop devices, or the files under them
# and defines
#   contents NAME        a checksum of the device
#   write_to NAME FILE   writes the file to the device's beginning
#   hold NAME, let_go    keeps it open
#   device NAME          the device as a table of another names it
#   waits PID            whether the process has nothing to do but wait, or has ended
#   settle NAME          returns when the device is gone
#   quiet                returns when nothing else looks at devices: udev opens them when something has happened
#
# The steps are written with the functions of compared_steps.sh.

echo "## nothing there"
t dm ls
t dm info
t dm info -c
t dm table
t dm status
t dm deps
t dm ls --tree
t dm remove_all

echo "## created in all ways"
t dm create one --table "0 2048 linear $A 0"
t dm info one
printf '# two pieces\n\n  0 1000 linear %s 8 # the first\n1000\t1048 linear %s 0\n' "$A" "$B" >"$TMPDIR/table"
t dm create file "$TMPDIR/table"
t piped "0 2048 zero
" create stdin
t dm create slot --notable
t dm info slot
t dm table slot
t dm status slot
t dm load slot --table "0 1024 linear $B 1024"
t dm info slot
t dm table slot
t dm table --inactive slot
t dm resume slot
t dm info slot
t dm create --concise "c1,,,,0 8 zero,8 8 error;c2,uuid-of-c2,9,ro,0 100 linear $C 0"
t piped "c3,,,rw,0 8 linear $C 8" create --concise
t dm -r create ro --table "0 512 linear $C 512"
t dm create -u some-uuid striped --table "0 2048 striped 2 16 $A 0 $B 0"
t dm create numbered -j "$MAJOR" -m 42 --table '0 8 error'
t dm create 'my disk' -u 'my uuid' --table '0 8 zero'
t dm create lines --table "0 8 zero
8 8 error"
t dm --noudevsync --noudevrules create quiet --readahead 256 --table '0 8 zero'
t dm create resumed --readonly --table '0 8 zero'

echo "## seen"
t dm ls
t dm table
t dm status
t dm info
t dm info -c
t dm deps
t dm table one
t dm table file
t dm table striped
t dm status striped
t dm table 'my disk'
t dm table 'my\x20disk'
t dm table one file
t dm info one c2
t dm status --target striped
t dm table --target zero
t dm table --target linear one
t dm table --target none
t dm ls --target error
t dm ls --target linear
t dm ls -o devname
t dm table --concise
t dm table --concise one
t dm info -u some-uuid
t dm table --uuid some-uuid
t dm info -j "$MAJOR" -m 42
t dm table --major "$MAJOR" --minor 42
t dm -u some-uuid table
t dm -v table one
t dm info -v one
t dm deps one striped
t dm deps file
t dm deps stdin
t dm deps -o blkdevname one
t dm --manglename none table 'my\x20disk'
t dm --manglename none ls
t dm --manglename hex table 'my disk'

echo "## reports"
t dm info -c one
t dm info -C one c2
t dm info -c -o name,uuid
t dm info -c --noheadings -o name
t dm info -c --noheadings -o name,attr,open,segments,events
t dm info -c -o name,open --separator ,
t dm info -c --noheadings --separator ' ' -o uuid,name
t dm info -c -o +tables_loaded,suspended,readonly one
t dm info -c -o name,device_count,devs_used,device_ref_count,names_using_dev file
t dm info -c -o name -O name
t dm info -c -o name,minor --sort -minor
t dm info -c -o name,segments -O -segments,name
t dm info -c --nameprefixes --noheadings -o name,uuid striped
t dm info -c --nameprefixes --unquoted -o name,attr striped
t dm info -c --rows -o name,minor one file
t dm info -c --rows --noheadings -o name,minor one file
t dm info -c -o name,mangled_name,unmangled_name 'my disk'
t dm info -c -S 'name=one' -o name
t dm info -c -S 'uuid=~some' -o name,uuid
t dm info -c -S 'segments>1' -o name,segments
t dm info -c -S 'name=one || name=file' -o name
t dm info -c -S 'name!=one && segments=2 && readonly=Writeable' -o name
t dm info -c -o info_all one
t dm info -c -o nonsense one
t dm table -S name=one
t dm info --columns --headings none -o name one
t dm info -c --headings full -o name,open one

echo "## contents"
see one file stdin slot c2 striped
write_to one pattern
write_to striped pattern
see one file striped

echo "## loaded, cleared, swapped"
t dm load one --table "0 2048 linear $B 0"
t dm info one
t dm table one
t dm table --inactive one
t dm table --inactive file
t dm info -c -o name,attr one
t dm clear one
t dm info -c -o name,attr one
t dm table --inactive one
t dm clear one
t dm reload one --table "0 2048 linear $C 0"
t dm load one --table "0 2048 linear $B 0"
t dm suspend one
t dm info one
t dm info -c -o name,attr,suspended one
t dm suspend one
t dm resume one
t dm resume one
t dm info one
t dm table one
see one
t dm load one --table '0 100 nonsense'
t dm table one
t dm table --inactive one
t dm load one "$TMPDIR/table"
t piped "0 2048 zero" load one
t dm resume --noflush --nolockfs one
see one
t dm suspend --noflush --nolockfs one file
t dm resume one file
t dm -v suspend one
t dm -v resume one
t dm create grown --table '0 8 zero'
t dm load grown --table '0 16 zero'
t dm resume grown
t dm table grown
t dm info -c -o name,events grown
t dm remove grown
t dm create flipped --table '0 8 zero'
t dm load flipped --readonly --table '0 8 zero'
t dm info -c -o name,attr flipped
t dm resume flipped
t dm info flipped
t dm load flipped --table '0 8 zero'
t dm resume flipped
t dm info -c -o name,attr,readonly flipped
t dm remove flipped
t dm create --readonly unloaded --notable
t dm info unloaded
t dm load unloaded --table '0 8 zero'
t dm resume unloaded
t dm info -c -o name,attr unloaded
t dm remove unloaded
t dm load one --notable
t dm load
t dm create twice --table '0 8 zero' --notable

echo "## suspended with I/O in flight"
write_to striped pattern 2 &
t dm suspend striped
t dm load striped --table "0 2048 striped 2 8 $B 0 $A 0"
contents striped >"$TMPDIR/parked" &
t dm info -c -o name,attr striped
t dm resume striped
wait
echo "parked: $(wc -c <"$TMPDIR/parked")"
t dm table striped
write_to striped pattern
see striped
see one

echo "## renamed"
t dm rename one uno
t dm ls --target linear
t dm table one
t dm table uno
see uno
t dm rename uno file
t dm rename none other
t dm rename uno ''
t dm rename uno a/b
t dm rename uno "$(printf 'n%.0s' {1..128})"
t dm rename uno --setuuid new-uuid
t dm info -c -o name,uuid uno
t dm rename uno --setuuid other-uuid
t dm rename stdin --setuuid new-uuid
t dm rename uno 'with space'
t dm rename 'with space' one
t dm rename one

echo "## stacked"
t dm create low --table "0 2048 linear $C 0"
t dm create mid --table "0 1024 linear $(device low) 0
1024 1024 linear $(device low) 1024"
t dm create high --table "0 512 striped 2 8 $(device mid) 0 $(device low) 0"
t dm info low
t dm info mid
t dm deps mid
t dm deps -o devname high
t dm deps -o devno high
t dm table mid
t dm table high
t dm info -c -o name,open,device_count,devs_used,names_using_dev,device_ref_count low mid high
t dm remove low
t dm ls --tree -o notrunc
t dm ls --tree -o ascii,nodevice
t dm ls --tree -o ascii,inverted,notrunc
t dm ls --tree -o compact,ascii,notrunc
t dm ls --tree -o active,open,rw,uuid,nodevice,ascii
t dm ls --tree -o nonsense
see high
t dm remove high mid low

echo "## messages and events"
t dm message one 0 hello
t dm message one 0 two words
t dm message one x hello
t dm message one
t dm message one 99999999 hello
t dm message none 0 hello
t dm info -c --noheadings -o events one
t dm wait one 7
t dm wait none
t dm wait
t_wait quiet dm rename quiet loud
t dm wait loud
t_wait loud dm remove loud
t dm info loud

echo "## refused"
t dm create one --table '0 8 zero'
t dm create other -u some-uuid --table '0 8 zero'
t dm create other -j "$MAJOR" -m 42 --table '0 8 zero'
t dm create other -m 43 --table '0 8 zero'
t dm create bad --table '0 8 nonsense'
t dm create bad --table '0 8 linear'
t dm create bad --table "0 8 linear $A"
t dm create bad --table "0 8 linear $A 0 0"
t dm create bad --table "0 8 linear $A x"
t dm create bad --table "0 99999999 linear $A 0"
t dm create bad --table '0 8 linear /dev/no-such-device 0'
t dm create bad --table '0 8 zero 1'
t dm create bad --table '0 8 zero
4 8 zero'
t dm create bad --table '0 8 zero
9 8 zero'
t dm create bad --table '8 8 zero'
t dm create bad --table '0 0 zero'
t dm create bad --table '0 8'
t dm create bad --table 'x 8 zero'
t dm create bad --table ''
t piped '' create bad
t dm remove bad
t dm create bad /no/such/file
t dm create bad --table "0 100 striped 2 16 $A 0 $B 0"
t dm create bad --table "0 64 striped 2 16 $A 0"
t dm create bad --table "0 64 striped 0 16 $A 0"
t dm create bad --table "0 64 striped 2 x $A 0 $B 0"
t dm create a/b --table '0 8 zero'
t dm create "$(printf 'n%.0s' {1..127})" --table '0 8 zero'
t dm remove "$(printf 'n%.0s' {1..127})"
t dm create "$(printf 'n%.0s' {1..128})" --table '0 8 zero'
t dm create "$(printf ' %.0s' {1..40})" --table '0 8 zero'
t dm create bad -u "$(printf 'u%.0s' {1..129})" --table '0 8 zero'
t dm create 'my\x5cx20disk' --table '0 8 zero'
t dm create 'mixed \x20' --table '0 8 zero'
t dm create control --table '0 8 zero'
t dm create .. --table '0 8 zero'
t dm create
t dm create --concise 'x,,,'
t dm create --concise 'x,,,bad,0 8 zero'
t dm create --concise 'x,,,,0 8 zero' --uuid y
t dm create one two three
t dm info none
t dm info -c none
t dm table none
t dm status none
t dm deps none
t dm suspend none
t dm resume none
t dm clear none
t dm load none --table '0 8 zero'
t dm remove none
t dm remove
t dm suspend
t dm table -u no-such-uuid
t dm info -j "$MAJOR" -m 999
t dm info -m 42
t dm remove none one none
t dm ls
t dm nonsense
t dm ls nonsense
t dm create one --nonsense

echo "## removed"
hold one
t dm info -c -o name,open one
t dm remove one
t dm remove --retry one
t dm info -c -o name,attr one
t dm remove --deferred one
t dm info one
t dm ls --target linear
let_go
settle one
t dm info one
t dm create one --table "0 2048 linear $A 0"
hold one
t dm remove --force one
t dm table one
let_go
t dm remove one
t dm create one --table "0 2048 linear $A 0"
t dm remove --force one
t dm info one
t dm create one --table "0 2048 linear $A 0"
t dm wipe_table one
t dm table one
t dm remove -f one
t dm remove c1 c2
t dm -u some-uuid rename another
t dm remove -u some-uuid
t dm remove -j "$MAJOR" -m 42
t dm remove --deferred c3
hold file
t dm remove_all
t dm ls
t dm remove_all --force
t dm table
let_go
t dm remove_all --force
t dm ls
