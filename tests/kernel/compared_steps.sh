# The steps of scripts that are compared: what both sides define is used, see compared.py. Sourced.
#
# `t COMMAND...` prints the command, what it says and its exit status. A title begins with "##".

t() {
    local status=0 line
    quiet
    echo "$ ${*//$'\n'/\\n}"
    "$@" >"$TMPDIR/out" 2>"$TMPDIR/err" || status=$?
    while IFS= read -r line || [ -n "$line" ]; do echo "1> $line"; done <"$TMPDIR/out"
    while IFS= read -r line || [ -n "$line" ]; do echo "2> $line"; done <"$TMPDIR/err"
    echo "= $status"
}
# see NAME...: what the devices hold.
see() {
    local name
    for name; do echo "$ contents $name"; echo "1> $(contents "$name")"; done
}
dm() { "$DM" "$@" </dev/null; }
piped() { local text=$1; shift; printf '%s' "$text" | "$DM" "$@"; }
# t_wait NAME COMMAND...: the effect of the command while another process waits for the device's next event.
t_wait() {
    local event
    event=$(dm info -c --noheadings -o events "$1")
    "$DM" wait "$1" "$event" >"$TMPDIR/waited" 2>&1 </dev/null &
    local waiter=$!
    until waits $waiter; do :; done
    t "${@:2}"
    wait $waiter
    echo "wait ended with $?: $(cat "$TMPDIR/waited")"
}
set +e

