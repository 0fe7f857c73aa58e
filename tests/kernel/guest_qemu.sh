#!/usr/bin/env bash
# QEMU as virtme-run starts it, but with guest_init.sh as the guest's first process. virtme-run has no option for
# that: on the kernel's command line its own init becomes the variable `guest_init`, and the last init= counts.
# $GUEST_FIRST is another first process, with its arguments, each in double quotes.
here=$(cd "$(dirname "$0")" && pwd)
words=()
for word; do
    # A name with spaces is in quotes there.
    if [[ $word =~ ^(.*[ \"])init=(.*)$ ]]; then
        word="${BASH_REMATCH[1]}guest_init=${BASH_REMATCH[2]} init=/bin/bash -- ${GUEST_FIRST:-\"$here/guest_init.sh\"}"
    fi
    words+=("$word")
done
exec qemu-system-x86_64 "${words[@]}"
