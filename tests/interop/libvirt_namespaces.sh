# libvirt_namespaces.sh FOLDER QEMU VIRSH_ARGUMENT...: virsh with libvirt's driver for QEMU in its process, as the first
# process of new namespaces, where the user and the files exist that the package of libvirt would install. Its state is
# in FOLDER. QEMU: what scripts/qemu_peer.py has unpacked.
set -euo pipefail
folder=$1 qemu=$2
shift 2
mount -t overlay -o "lowerdir=$qemu/root/usr/share:/usr/share" share /usr/share
for file in passwd group; do
    cp /etc/$file "$folder"
    mount --bind "$folder/$file" /etc/$file
done
echo 'libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin' >> /etc/passwd
echo 'libvirt-qemu:x:64055:' >> /etc/group
mkdir -p "$folder/libvirt/etc"
# Without its daemon for logs, and without cgroups.
printf 'stdio_handler = "file"\ncgroup_controllers = []\n' > "$folder/libvirt/etc/qemu.conf"
# Not exec: this shell waits for the processes that lose their parent.
HOME=$folder "$qemu/virsh" -c "qemu:///embed?root=$folder/libvirt" "$@"
exit 0
