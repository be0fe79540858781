#!/usr/bin/env bash
# Makes the RPM and DEB packages: `make package`.
#
#   PACKAGE_ARCH=x86_64|aarch64   one architecture only
#   PACKAGE_BINARY=FILE           pack this program, and build none
#   PACKAGE_RELEASE=N             number behind the version (1)
#   PACKAGE_MAINTAINER=TEXT       name and address for the DEB
#   PACKAGE_FOLDER=FOLDER         where the packages go ($CARGO_TARGET_DIR/packages)
#
# For each architecture: build one program that runs on glibc 2.17 and newer, check that, stage the
# tree that is to be installed, and pack it twice, with dpkg-deb and with rpmbuild.
set -euo pipefail

: "${CARGO_TARGET_DIR:?set by the Makefile}" "${CVMFS_SNAPSHOTTER_CACHE:?set by the Makefile}"
tools=$CVMFS_SNAPSHOTTER_CACHE/tools
name=cvmfs-snapshotter
release=${PACKAGE_RELEASE:-1}
folder=${PACKAGE_FOLDER:-$CARGO_TARGET_DIR/packages}
# EL7's.
oldest_glibc=2.17
cd "$(dirname "$0")/.."

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'package: %s\n' "$*" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cargo metadata --locked --format-version 1 >"$work/metadata.json"
version=$(jq -r ".packages[] | select(.name == \"$name\") | .version" "$work/metadata.json")
# The same program gives the same packages, byte by byte.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
export SOURCE_DATE_EPOCH

# ---- The program

# Zig's C and C++ compiler brings the headers and stubs of any glibc, and a libc++ to link in.
build() {
    local arch=$1 target=$1-unknown-linux-gnu
    say "building $name for $target, glibc $oldest_glibc, with the C core of gRPC, which takes long"
    # clang of this zig stops at something that this Abseil does.
    env "CXXFLAGS_${target//-/_}=-Wno-missing-template-arg-list-after-template-kw" \
        CARGO_PROFILE_RELEASE_STRIP=symbols PATH="$tools/cargo/bin:$tools/python/bin:$PATH" \
        cargo zigbuild --locked --release --package $name --bin $name --target "$target.$oldest_glibc"
    binary=$CARGO_TARGET_DIR/$target/release/$name
}

# The highest version of glibc that a program asks for.
highest_glibc() {
    readelf --wide --version-info "$1" | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -uV | tail -1
}

check() {
    local arch=$1 binary=$2 library under=()
    [ "$(printf '%s\n' "$(highest_glibc "$binary")" $oldest_glibc | sort -V | tail -1)" = $oldest_glibc ] ||
        die "$binary needs glibc $(highest_glibc "$binary")"
    for library in $(readelf --wide --dynamic "$binary" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
        case $library in
        libc.so.6 | libdl.so.2 | libm.so.6 | libpthread.so.0 | librt.so.1 | libresolv.so.2 | libutil.so.1 | ld-linux-*) ;;
        *) die "$binary needs $library, which is not of glibc" ;;
        esac
    done
    [ "$arch" = "$(uname -m)" ] || under=("qemu-$arch-static" -L "/usr/$arch-linux-gnu")
    [ "$("${under[@]}" "$binary" --version)" = "$name $version" ] || die "$binary does not run"
    say "$binary: glibc $(highest_glibc "$binary"), $(stat -c %s "$binary") bytes"
}

# ---- Licences of everything that is linked in

# The same text is written once, under the names of all that have it.
licence() {
    local of=$1 text sum
    shift
    [ $# -gt 0 ] || die "no licence text of $of"
    for text; do
        [ -s "$text" ] || die "no licence text of $of: $text"
        sum=$(sha256sum <"$text" | cut -c1-64)
        cp --no-preserve=mode "$text" "$work/licences/$sum.text"
        printf '%s\n' "$of" >>"$work/licences/$sum.names"
    done
}

# Texts in a folder of sources, by the names that are usual.
licence_in() {
    local of=$1 folder=$2 texts
    mapfile -t texts < <(find "$folder" -maxdepth 1 -type f \( -iname 'licen[cs]e*' -o -iname 'copying*' \
        -o -iname 'copyright*' -o -iname 'unlicense*' -o -iname 'notice*' \) | sort)
    licence "$of" "${texts[@]}"
}

licences() {
    local target=$1 to=$2 crate version folder part zig sum
    rm -rf "$work/licences"
    mkdir "$work/licences"
    while read -r crate version; do
        folder=$(jq -r ".packages[] | select(.name == \"$crate\" and .version == \"${version#v}\") | .manifest_path" \
            "$work/metadata.json")
        folder=${folder%/Cargo.toml}
        case $crate in
        "$name") ;;
        grpcio-sys)
            licence "gRPC, in $crate $version" "$folder/grpc/LICENSE" "$folder/grpc/NOTICE.txt"
            for part in "$folder"/grpc/third_party/*/; do
                case $(basename "$part") in
                # Rules for other build systems and languages, or files without code.
                android | envoy-api | googleapis | py | rake-compiler-dock | toolchains) ;;
                cares) licence_in "c-ares, in $crate $version" "$part/cares" ;;
                *) licence_in "$(basename "$part"), in $crate $version" "$part" ;;
                esac
            done
            ;;
        libz-sys)
            licence_in "$crate $version" "$folder"
            licence_in "zlib, in $crate $version" "$folder/src/zlib"
            ;;
        *) licence_in "$crate $version" "$folder" ;;
        esac
    done < <(cargo tree --locked --package $name --edges normal,no-proc-macro --target "$target" --prefix none \
        --format '{p}' | sed 's/ (.*//' | sort -u)
    if [ -z "${PACKAGE_BINARY:-}" ]; then
        zig=$("$tools/python/bin/python3" -c 'import os, ziglang; print(os.path.dirname(ziglang.__file__))')
        licence "Zig's compiler-rt" "$zig/LICENSE"
        licence "the start-up code of glibc" "$zig/lib/libc/glibc/LICENSES"
        for part in libcxx libcxxabi libunwind; do
            licence_in "LLVM's $part" "$zig/lib/$part"
        done
    fi
    {
        echo "What is linked into $name $version, and the licences of it. The standard library of Rust is in"
        echo "rust-library.html beside this file."
        for part in "$work"/licences/*.names; do
            printf '\n%s\n' "================================================================================"
            sort -u "$part"
            printf '%s\n\n' "================================================================================"
            cat "${part%.names}.text"
        done
    } >"$to/third-party-licenses.txt"
    sum=$(rustc --print sysroot)/share/doc/rust/COPYRIGHT-library.html
    [ -s "$sum" ] || die "no licence text of Rust's standard library: $sum"
    cp "$sum" "$to/rust-library.html"
}

# ---- The tree

stage() {
    local target=$1 binary=$2 to=$3 doc=$3/usr/share/doc/$name page
    install -D -m 755 "$binary" "$to/usr/bin/$name"
    # As the Go one is called.
    ln -s $name "$to/usr/bin/cvmfs_snapshotter"
    install -D -m 755 packaging/replace-go-unit "$to/usr/libexec/$name/replace-go-unit"
    install -D -m 644 -t "$to/usr/lib/systemd/system" packaging/$name.service packaging/$name.socket
    install -D -m 644 packaging/config.toml "$to/etc/containerd-cvmfs-grpc/config.toml"
    install -D -m 644 packaging/containerd-conf.d.toml "$to/etc/containerd/conf.d/$name.toml"
    for page in docs/*.8; do
        install -D -m 644 -t "$to/usr/share/man/man8" "$page"
        gzip -9n "$to/usr/share/man/man8/$(basename "$page")"
    done
    ln -s $name.8.gz "$to/usr/share/man/man8/cvmfs_snapshotter.8.gz"
    mkdir "$work/completions"
    "$pages" completions "$work/completions"
    install -D -m 644 "$work/completions/$name.bash" "$to/usr/share/bash-completion/completions/$name"
    install -D -m 644 "$work/completions/$name.fish" "$to/usr/share/fish/vendor_completions.d/$name.fish"
    install -D -m 644 -t "$to/usr/share/zsh/site-functions" "$work/completions/_$name"
    rm -r "$work/completions"
    # As in the sources, so that links from one to the other hold.
    install -D -m 644 -t "$doc" README.md SECURITY.md CHANGELOG.md CONTRIBUTING.md packaging/symlink-only.conf
    install -D -m 644 -t "$doc/packaging" packaging/prometheus-alerts.yaml packaging/grafana-dashboard.json \
        packaging/config.toml packaging/$name.service packaging/$name.socket
    install -D -m 644 -t "$doc/docs" docs/*.md docs/*.svg
    for page in docs/containerd/*; do
        [ ! -e "$page" ] || install -D -m 644 -t "$doc/docs/containerd" "$page"
    done
    install -D -m 644 CHANGELOG.md "$doc/changelog"
    licences "$target" "$doc"
    gzip -9n "$doc/changelog" "$doc/third-party-licenses.txt" "$doc/rust-library.html"
    find "$to" -type d -exec chmod 755 {} +
}

# ---- The packages

pack_deb() {
    local arch=$1 tree=$2 doc=$2/usr/share/doc/$name deb_arch
    case $arch in
    x86_64) deb_arch=amd64 ;;
    aarch64) deb_arch=arm64 ;;
    esac
    rm -f "$folder/${name}_"*"_$deb_arch.deb"
    install -m 644 packaging/deb/copyright "$doc/copyright"
    printf '%s (%s-%s) stable; urgency=medium\n\n  * See changelog.gz.\n\n -- %s  %s\n' $name "$version" "$release" \
        "$maintainer" "$(date -u -R -d "@$SOURCE_DATE_EPOCH")" >"$doc/changelog.Debian"
    gzip -9n "$doc/changelog.Debian"
    mkdir "$tree/DEBIAN"
    install -m 755 -t "$tree/DEBIAN" packaging/deb/{preinst,postinst,prerm,postrm}
    (cd "$tree" && find etc -type f | sort | sed 's,^,/,' >DEBIAN/conffiles &&
        find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)
    sed -e "s/@VERSION@/$version/; s/@RELEASE@/$release/; s/@ARCH@/$deb_arch/; s/@MAINTAINER@/$maintainer/" \
        -e "s/@SIZE@/$(du -sk --apparent-size --exclude=DEBIAN "$tree" | cut -f1)/" \
        -e "s/@GLIBC@/$(highest_glibc "$tree/usr/bin/$name")/" packaging/deb/control >"$tree/DEBIAN/control"
    dpkg-deb --root-owner-group -Zxz "-z${level}" --build "$tree" "$folder/${name}_$version-${release}_$deb_arch.deb" >&2
}

pack_rpm() {
    local arch=$1 tree=$2 doc=$2/usr/share/doc/$name licences=$2/usr/share/licenses/$name
    rm -f "$folder/$name-"*".$arch.rpm"
    mkdir -p "$licences"
    install -m 644 LICENSE "$licences"
    mv "$doc"/{third-party-licenses.txt,rust-library.html}.gz "$licences"
    rpmbuild -bb --quiet --target "$arch-linux" --define "_topdir $work/rpm" --define "_rpmdir $folder" \
        --define "_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm" --define "_buildhost localhost" \
        --define "packager $maintainer" --define "date_ $(LC_ALL=C date -u -d "@$SOURCE_DATE_EPOCH" '+%a %b %d %Y')" \
        --define "_binary_payload w$level.xzdio" --define "stage $tree" --define "version_ $version" \
        --define "release_ $release" packaging/rpm/$name.spec >"$work/rpm.log" 2>&1 ||
        { cat "$work/rpm.log" >&2; die "rpmbuild failed"; }
}

# Who builds packages for others names himself.
maintainer=${PACKAGE_MAINTAINER:-cvmfs-snapshotter maintainers <maintainers@cvmfs-snapshotter.invalid>}
level=6
mkdir -p "$folder"
pages=$CARGO_TARGET_DIR/debug/pages
if [ -n "${PACKAGE_BINARY:-}" ]; then
    # For tests: in seconds.
    level=0
    PACKAGE_ARCH=$(uname -m)
fi
# Beside a program that is there, it was built as well, with all of the workspace.
if [ -z "${PACKAGE_BINARY:-}" ] || [ ! -x "$pages" ]; then
    cargo build --quiet --locked --package pages
fi
for arch in ${PACKAGE_ARCH:-x86_64 aarch64}; do
    if [ -n "${PACKAGE_BINARY:-}" ]; then
        binary=$work/$name
        strip --strip-all -o "$binary" "$PACKAGE_BINARY"
    else
        build "$arch"
        check "$arch" "$binary"
    fi
    stage "$arch-unknown-linux-gnu" "$binary" "$work/tree"
    cp -a "$work/tree" "$work/deb-tree"
    pack_deb "$arch" "$work/deb-tree"
    pack_rpm "$arch" "$work/tree"
    rm -rf "$work/tree" "$work/deb-tree"
done
say "packages in $folder:"
ls -l "$folder" >&2
