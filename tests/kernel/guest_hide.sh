# hide ROOT: in the root of a guest, udev and what systemd does at boot, as the host has them. Sourced.
hide() {
    local folder
    for folder in {,/usr}/lib/{systemd,udev,tmpfiles.d} /etc/{systemd,udev,tmpfiles.d}; do
        # Once, where /lib is /usr/lib.
        [ ! -d "$1$folder" ] || [ -L "$1${folder%/*}" ] || mount -n -t tmpfs -o mode=755 hidden "$1$folder"
    done
}
