# guest_systemd.sh WORK KERNEL SYSTEMD UDEV BLKLOOM: the first process of a guest that systemd boots. Makes a root that
# can be written to (the host's files below a layer in memory), with the unpacked systemd and udev and only the units
# that the test needs, and becomes systemd. WORK is shared with the host; WORK/etc is copied to /etc.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
set -euo pipefail
work=$1 kernel=$2 systemd=$3 udev=$4 blkloom=$5

if [ -z "${guest_root:-}" ]; then
    # Programs start faster from a root with a cache, so the rest is done there.
    mountpoint -q /proc || mount -t proc proc /proc
    modprobe -d "$kernel" -a overlay virtio_blk ext4 fuse loop
    mount -t tmpfs -o mode=755 guest /run
    mkdir /run/{lower,upper,upper-work,root}
    mount -t 9p -o ro,version=9p2000.L,trans=virtio,access=any,msize=512000,cache=loose kept /run/lower
    mount -t overlay -o lowerdir=/run/lower,upperdir=/run/upper,workdir=/run/upper-work root /run/root
    mkdir -p "/run/root$work" /run/root/before
    mount -t 9p -o version=9p2000.L,trans=virtio,access=any,msize=512000 work "/run/root$work"
    mount -t proc proc /run/root/proc
    mount -t sysfs sysfs /run/root/sys
    mount -t devtmpfs dev /run/root/dev
    cd /run/root
    pivot_root . before
    exec chroot . /usr/bin/env guest_root=yes /bin/bash "$0" "$@"
fi

touch "$work/begun"
umount -l /before
lib=/usr/lib
[ -L /lib ] || lib=/lib
shown=$lib/systemd
rm -rf /etc/{systemd,udev,tmpfiles.d} {,/usr}/lib/{systemd,udev,tmpfiles.d,modules}
libraries=$(dirname "$(find "$systemd/usr/lib" -name 'libseccomp.so.2')")
mkdir -p $shown/{system,system-generators} $lib/udev/rules.d $lib/modules /etc/{systemd,blkloom,udev}
cp -a "$systemd"/lib/systemd/systemd{,-shutdown,-fsck} $shown/
cp -a "$systemd/lib/systemd/system-generators/systemd-fstab-generator" $shown/system-generators/
cp -a "$systemd"/lib/systemd/system/{*.target,systemd-poweroff.service,systemd-fsck@.service} $shown/system/
cp -an "$libraries"/. "${libraries#"$systemd"}/"
cp -a "$systemd/bin/systemctl" "$udev/udevadm" /usr/local/bin/
ln -s /usr/local/bin/udevadm $shown/systemd-udevd
cp -a "$systemd/lib/udev/rules.d/99-systemd.rules" $lib/udev/rules.d/
# Not in namespaces: these open block devices, also those of other programs on the host.
[ "$guest_root" = namespaces ] ||
    cp -a "$udev"/rules.d/{50-udev-default,60-block,60-persistent-storage}.rules $lib/udev/rules.d/
ln -s "$kernel"/lib/modules/* $lib/modules/
ln -sf "$blkloom" /usr/local/bin/blkloom
cp -r "$work/etc/." /etc/
chown -R 0:0 /etc/{fstab,blkloom,systemd,udev}
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
exec env -i $shown/systemd
