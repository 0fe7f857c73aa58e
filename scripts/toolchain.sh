#!/bin/sh
# Checks the tools that a build needs before there is a virtual environment: Python with venv, a C linker, and a
# cargo that supports the edition of the engine. As root, it installs the Debian packages; otherwise it prints all
# missing tools and exits 1.
#
# usage: toolchain.sh PYTHON
set -eu
here=$(dirname "$0")
python=$1
missing=

lacks() {
    missing="$missing
  $1"
}

# 1.88 >= $2 as numbers, part by part
at_least() {
    printf '%s\n%s\n' "$2" "$1" | sort --check=quiet --version-sort
}

debian_can() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null && command -v dpkg-query >/dev/null
}

if ! command -v "$python" >/dev/null; then
    if debian_can; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends python3 >/dev/null
    else
        lacks "$python: Python 3.11 or later (Debian's package is python3), or name yours: make PYTHON=..."
    fi
fi
if command -v "$python" >/dev/null; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        lacks "Python 3.11 or later: $python is $("$python" -V); name another: make PYTHON=..."
    elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        # Debian keeps ensurepip in a package of its own, and venv fails half way without it.
        if debian_can && [ "$(readlink -f "$(command -v "$python")")" = "$(readlink -f /usr/bin/python3)" ]; then
            "$python" "$here/debian.py" install python3-venv
        else
            lacks "$python has no ensurepip, which makes virtual environments (Debian's package is python3-venv)"
        fi
    fi
fi

if ! command -v cc >/dev/null; then
    if debian_can; then
        "$python" "$here/debian.py" install gcc libc6-dev
    else
        lacks "cc: the linker for the engine (Debian's packages are gcc and libc6-dev)"
    fi
fi

wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$here/../engine/Cargo.toml")
if ! command -v cargo >/dev/null; then
    lacks "cargo $wanted or later, with rustc: rustup installs it"
else
    found=$(cargo --version | cut -d ' ' -f 2)
    at_least "$found" "$wanted" || lacks "cargo $wanted or later: $(command -v cargo) is $found; rustup installs a newer one"
fi

if [ -n "$missing" ]; then
    echo "blkloom cannot be built here yet. Missing:$missing" >&2
    exit 1
fi
