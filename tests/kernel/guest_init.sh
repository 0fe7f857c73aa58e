# The first process of a guest: hides what the host has installed, then is virtme-ng's init, `guest_init`.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
source "$(dirname "$0")/guest_hide.sh"
hide ""
init=$guest_init
unset guest_init
exec "$init"
