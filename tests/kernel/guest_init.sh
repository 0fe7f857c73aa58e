# The first process of a guest: its root becomes the host's files through a mount with a cache (without it, each page of
# each program that starts is asked for), without what the host has installed. Then it is virtme-ng's init, `guest_init`.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
source "$(dirname "$0")/guest_hide.sh"
mount -n -t tmpfs -o mode=755 guest /run
mkdir /run/root
mount -n -t 9p -o ro,version=9p2000.L,trans=virtio,access=any,msize=512000,cache=loose kept /run/root
hide /run/root
# virtme-ng's init runs it, for which there is nothing left to do.
[ ! -e /usr/bin/systemd-tmpfiles ] || mount -n --bind /bin/true /run/root/usr/bin/systemd-tmpfiles
init=$guest_init
unset guest_init
exec chroot /run/root "$init"
