# Options for nodes, with the same words for dmsetup in a kernel and for blkloom. Sourced after dmsetup_compared.sh, where
# blkloom can make block devices.
#
# `node NAME` (compared.py) is the path of a node.

seen() { if [ -b "$(readlink -f "$(node "$1")")" ]; then stat -L -c '%a %u %g' "$(node "$1")"; else echo none; fi; }
there() { if [ -b "$(readlink -f "$(node "$1")")" ]; then echo made; else echo none; fi; }
quietly() { "$@" 2>/dev/null; }
lose() { rm "$(node "$1")"; }

echo "## nodes made by create"
t dm create a --addnodeoncreate --mode 640 --uid 12 --gid 34 --table '0 8 zero'
t seen a
t lose a
t there a
t dm mknodes a
t there a
t lose a
t dm mknodes
t there a
t dm mknodes unknown
t dm mknodes -u unknown
t dm rename a b
t there a
t there b
t dm load b --table '0 16 zero'
t dm resume b
t there b
t dm remove b
t there b
t dm create a --addnodeonresume -M 600 -U 12 -G 34 --table '0 8 zero'
t seen a
t dm remove a
t quietly dm create a --mode 888 --addnodeoncreate --table '0 8 zero'
t dm ls

echo "## nodes made by resume"
t dm create late --notable --addnodeonresume
t there late
t dm load late --table '0 8 zero'
t dm resume late --addnodeonresume
t there late
t dm remove late
t there late
