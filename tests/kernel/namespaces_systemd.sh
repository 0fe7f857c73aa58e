# namespaces_systemd.sh CONSOLE WORK KERNEL SYSTEMD UDEV BLKLOOM: the first process in new namespaces, which systemd boots
# as guest_systemd.sh does. CONSOLE is a terminal.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
set -euo pipefail
console=$1 work=$2 here=$(cd "$(dirname "$0")" && pwd)
shift
mount -t tmpfs -o mode=755 guest /run
mkdir /run/{upper,upper-work,root}
mount -t overlay -o lowerdir=/,upperdir=/run/upper,workdir=/run/upper-work root /run/root
mkdir -p "/run/root$work" /run/root/before
for shared in "$work" "${here%/tests/kernel}"; do mount --bind "$shared" "/run/root$shared"; done
mount -t proc proc /run/root/proc
mount -t sysfs sysfs /run/root/sys
mount -t cgroup2 cgroup2 /run/root/sys/fs/cgroup
mount -t devtmpfs dev /run/root/dev
mount --bind "$console" /run/root/dev/console
cd /run/root
pivot_root . before
exec chroot . /usr/bin/env guest_root=namespaces /bin/bash "$here/guest_systemd.sh" "$@"
