# One door for everyday work. Each target is also the plain commands that stand below it.
#
#   make          this list
#   make build    the daemon and the programs of the tests
#   make demo     pull and run a real image through the snapshotter, next to a normal pull
#   make test     every test
#   make test-matrix   every version of containerd, or those of CONTAINERD_VERSIONS="1.7 2.1"
#   make storm    hundreds of kills while containerd and others work, by hand
#   make random   a thousand cases of random operations, by hand
#   make bench    what calls, pulls and container starts cost, beside other snapshotters (20 min)
#   make bench-plot   draws docs/growth.svg: what a call costs as the store grows
#   make fuzz     whatever reads what others wrote, guided by coverage, FUZZ_SECONDS for each target
#   make package  RPM and DEB packages for x86_64 and aarch64 (the C core is built for each; PACKAGE_ARCH=x86_64 for one)
#   make test-packages   the tests of packages, on what "make package" made
#   make manual   the manual pages in docs, of what the program takes
#   make lint     formatting, clippy, shellcheck, dependencies
#
# demo, bench, package, storm, random and the tests need root on Debian 12 and a Rust toolchain; tests/setup.sh installs the rest.
# A test whose prerequisite is missing on this host fails, unless ALLOW_SKIP=1.

# What is downloaded and built stays here; remove the folder to start afresh.
export CVMFS_SNAPSHOTTER_CACHE ?= $(HOME)/.cache/cvmfs-snapshotter
export CARGO_TARGET_DIR ?= $(CVMFS_SNAPSHOTTER_CACHE)/target
export CVMFS_SNAPSHOTTER_BINARY ?= $(CARGO_TARGET_DIR)/debug/cvmfs-snapshotter
# Packages of the debug program, which the tests install.
export CVMFS_SNAPSHOTTER_PACKAGES ?= $(CARGO_TARGET_DIR)/packages-dev
tools := $(CVMFS_SNAPSHOTTER_CACHE)/tools

FUZZ_SECONDS ?= 300
FUZZ_TARGETS ?= filters requests digest reference manifest records config quoted
# What cargo-fuzz passes too, without its sanitizer, which is not to be had with a stable compiler.
fuzz_flags := -Cpasses=sancov-module \
	$(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters pc-table trace-compares) \
	-Ccodegen-units=1
fuzz_cache := $(CVMFS_SNAPSHOTTER_CACHE)/fuzz
# Named, so that the flags are not those of build scripts.
host := $(shell rustc -vV | sed -n 's/^host: //p')

cargo_deny := "$(tools)/cargo/bin/cargo-deny" --locked
package_targets := x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu

.PHONY: help build demo bench bench-plot test test-matrix storm random package test-packages manual \
	test-unit test-schedules test-testbed test-suite test-scene fuzz lint advisories

help:
	@sed -n 's/^#   //p' Makefile

# The first build compiles gRPC's C core, which takes 6 to 9 minutes on two cores.
build:
	tests/setup.sh build
	cargo build --workspace --locked

# DEMO_PICTURE=docs/demo.svg draws what was measured.
demo: build
	tests/setup.sh demo
	"$(CARGO_TARGET_DIR)/debug/demo"

# Measures an optimised daemon with an optimised client, for which the C core is built once more.
# BENCH_PARTS and other variables choose what is measured, see docs/performance.md.
bench:
	tests/setup.sh build
	tests/setup.sh bench
	cargo build --release --locked --package cvmfs-snapshotter --package cvmfs-testbed --package scene \
		--bin cvmfs-snapshotter --bin cvmfs-test-client --bin bench
	CVMFS_SNAPSHOTTER_BINARY="$(CARGO_TARGET_DIR)/release/cvmfs-snapshotter" "$(CARGO_TARGET_DIR)/release/bench"

bench-plot:
	BENCH_PARTS=growth BENCH_PLOT=docs/growth.svg $(MAKE) bench

test: build
	tests/setup.sh test
	cargo build --locked --package cvmfs-testbed --features cvmfs-crate
	PACKAGE_BINARY="$(CVMFS_SNAPSHOTTER_BINARY)" PACKAGE_FOLDER="$(CVMFS_SNAPSHOTTER_PACKAGES)" packaging/build.sh
	$(MAKE) test-unit test-testbed test-suite test-scene

test-unit:
	cargo test --locked --package cvmfs-snapshotter --package pages
	$(MAKE) test-schedules

# The protocols of several threads under schedules that the crate shuttle chooses, see src/sync.rs.
test-schedules:
	cargo test --locked --package cvmfs-snapshotter --lib --features shuttle schedules::

# Tests the publisher and the FUSE clients that the other tests use, against the source trees.
test-testbed:
	cargo test --locked --package cvmfs-testbed --features cvmfs-crate

# Runs containerd's own test suite for snapshotters against the daemon.
test-suite:
	cd tests/containerd && "$(tools)/go" vet ./... && "$(tools)/go" test -count=1 ./...

# Tests the daemon over its socket, and with the real containerd, runc and registry. Each test starts several servers,
# so only two run at a time.
test-scene:
	cargo test --locked --no-fail-fast --package scene -- --test-threads 2

# Tests every version of containerd, where `make test` tests two. The first run builds three of them, a few
# minutes for each on two cores. CONTAINERD_VERSIONS selects versions, and with them the modules of tests.
test-matrix: build
	tests/setup.sh test
	tests/setup.sh containerds $(CONTAINERD_VERSIONS)
	CONTAINERD_VERSIONS="$${CONTAINERD_VERSIONS:-1.6 1.7 2.1 2.2 2.3 2.4}" \
		cargo test --locked --no-fail-fast --package scene --features every-containerd --test matrix --test remedies \
		-- --test-threads 2 $(if $(CONTAINERD_VERSIONS),default_configuration) \
		$(foreach minor,$(CONTAINERD_VERSIONS),containerd_$(subst .,_,$(minor)))

# Results are in $(CARGO_TARGET_DIR)/packages.
package:
	tests/setup.sh build
	tests/setup.sh package
	packaging/build.sh

# docs/*.8, of the program's options and packaging/pages/sections; a test compares them.
manual:
	cargo run --locked --package pages -- manual docs

# Tests only the packages of this machine's architecture, because they are installed.
test-packages: build
	tests/setup.sh test
	CVMFS_SNAPSHOTTER_PACKAGES="$(CARGO_TARGET_DIR)/packages" \
		cargo test --locked --package scene --test packages -- --test-threads 2

# These are the long forms of two tests. STORM_SEED and PROPTEST_RNG_SEED repeat a run.
storm: build
	tests/setup.sh test
	STORM_KILLS="$${STORM_KILLS:-300}" cargo test --locked --package scene --test storm -- --nocapture

random: build
	tests/setup.sh test
	PROPTEST_CASES="$${PROPTEST_CASES:-1000}" cargo test --locked --package scene --test random -- --nocapture

# Begins with the corpus, and keeps what it finds in the cache; a crash is written beside it.
fuzz:
	cd tests/fuzz && RUSTFLAGS="$(fuzz_flags)" CARGO_TARGET_DIR="$(fuzz_cache)/target" \
		cargo build --locked --release --target $(host)
	for target in $(FUZZ_TARGETS); do \
		mkdir -p "$(fuzz_cache)/found/$$target" && \
		FUZZ_TARGET=$$target "$(fuzz_cache)/target/$(host)/release/fuzz" -max_total_time=$(FUZZ_SECONDS) \
			-max_len=4096 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
			-artifact_prefix="$(fuzz_cache)/$$target-" \
			"$(fuzz_cache)/found/$$target" tests/fuzz/corpus/$$target tests/fuzz/crashes || exit 1; \
	done

lint:
	tests/setup.sh lint
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- --deny warnings
	cargo clippy --package cvmfs-snapshotter --lib --no-default-features --features fuzz --locked -- --deny warnings
	cargo fmt --check --manifest-path tests/fuzz/Cargo.toml
	shellcheck tests/setup.sh .ci/run packaging/build.sh packaging/replace-go-unit packaging/deb/p*
	for target in $(package_targets); do \
		$(cargo_deny) --target $$target check bans licenses sources && \
		$(cargo_deny) --target $$target --manifest-path tests/fuzz/Cargo.toml --config deny.toml \
			check bans licenses sources || exit 1; \
	done

# Needs the RustSec database, which not every network reaches: not part of lint. All of both lock files, whatever
# it is for and wherever it is built; what is ignored stands in deny.toml, with the reason.
advisories:
	tests/setup.sh lint
	$(cargo_deny) --workspace --all-features check advisories
	$(cargo_deny) --manifest-path tests/fuzz/Cargo.toml --config deny.toml --all-features check advisories
