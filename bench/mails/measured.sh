# Functions of the mails' test scripts, which source this file.

# measured NAME fio OPTION...: runs fio. With RESULTS, a directory, its results are stored there: N.name, N.json, logs of
# its jobs, and N.before and N.after with counters of the kernel.
measured() {
    local name=$1 log
    shift
    echo "--- $name"
    if [ -z "${RESULTS:-}" ]; then
        "$@"
        return
    fi
    log=$RESULTS/$(find "$RESULTS" -name '*.name' | wc -l)
    counters >"$log.before"
    # The logs say when each job ran: fio divides the I/Os of all jobs by the longest run time of one of them.
    "$@" --group_reporting --output-format=json --output="$log.json" --eta=never \
        --write_lat_log="$log" --disable_slat=1 --disable_lat=1 --log_avg_msec=20 --log_unix_epoch=1
    counters >"$log.after"
    echo "$name" >"$log.name"
}

# Context switches of all processes, and the sizes of the page cache in KiB.
counters() {
    grep '^ctxt' /proc/stat
    grep -E '^(Buffers|Cached):' /proc/meminfo
}

# A file of SIZE bytes with all of its blocks.
written() { dd if=/dev/zero of="$1" bs=1M count=$(($2 >> 20)) iflag=fullblock conv=fsync status=none; }

drop_caches() { echo 3 >/proc/sys/vm/drop_caches; }
