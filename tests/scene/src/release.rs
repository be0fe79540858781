//! Versions of containerd that the set-up provides, each with its own programs, and the ways in
//! which its configuration can name the snapshotter: the files of `docs/containerd`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::containerd::OURS;
use crate::machine::{SOCKET, STATE};
use crate::prerequisite;
use crate::process::{cache, run};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Release {
    V1_6,
    V1_7,
    V2_1,
    V2_2,
    V2_3,
    V2_4,
}

/// Calls `$tests! { containerd_1_6 V1_6; … }`, a macro that makes a module of tests for each version. A test of a version
/// that `make test` does not install would be reported as ok without having run, so it exists only with the feature.
#[cfg(feature = "every-containerd")]
#[macro_export]
macro_rules! for_each_release {
    ($tests:ident) => {
        $tests! {
            containerd_1_6 V1_6;
            containerd_1_7 V1_7;
            containerd_2_1 V2_1;
            containerd_2_2 V2_2;
            containerd_2_3 V2_3;
            containerd_2_4 V2_4;
        }
    };
}

/// Calls `$tests! { containerd_1_6 V1_6; … }` as with the feature `every-containerd`, for the versions of `make test`.
#[cfg(not(feature = "every-containerd"))]
#[macro_export]
macro_rules! for_each_release {
    ($tests:ident) => {
        $tests! {
            containerd_1_6 V1_6;
            containerd_2_3 V2_3;
        }
    };
}

/// The versions that `make test` runs: the oldest, which most tests use, and the one with long-term support.
const DEFAULT_VERSIONS: &str = "1.6 2.3";

impl Release {
    pub fn minor(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
            Self::V2_2 => "2.2",
            Self::V2_3 => "2.3",
            Self::V2_4 => "2.4",
        }
    }

    /// Whether a test is to run with this version: `CONTAINERD_VERSIONS` names the selected ones. A version that is
    /// selected and not installed is a missing prerequisite.
    pub fn is_selected(self) -> bool {
        let selected = std::env::var("CONTAINERD_VERSIONS").ok().filter(|versions| !versions.trim().is_empty());
        if !selected.as_deref().unwrap_or(DEFAULT_VERSIONS).split_whitespace().any(|minor| minor == self.minor()) {
            return false;
        }
        let is_missing = !self.program("containerd").exists();
        prerequisite::is_met(
            is_missing.then(|| format!("containerd {0} is missing: tests/setup.sh containerds {0}", self.minor())),
        )
    }

    /// Where its programs lie: containerd, ctr, the shim and runc.
    pub fn programs(self) -> PathBuf {
        cache().join("tools/containerd").join(self.minor()).join("bin")
    }

    pub fn program(self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    /// A search path on which its own shim and runc come first.
    pub fn search_path(self) -> String {
        format!("{}:{}", self.programs().display(), std::env::var("PATH").unwrap_or_default())
    }

    /// Whether images are pulled by a service in containerd, which asks for layers as the
    /// configuration says, and not as its client does.
    pub fn has_transfer(self) -> bool {
        self >= Self::V2_1
    }

    /// Whether the registration can have a file of its own in `/etc/containerd/conf.d`.
    pub fn has_conf_d(self) -> bool {
        self >= Self::V2_2
    }

    /// Whether it passes on what a proxy plugin exports: Debian's 1.6 is older than that.
    pub fn has_exports(self) -> bool {
        self >= Self::V1_7
    }

    /// Whether it passes on capabilities of a proxy plugin: 1.7 does from 1.7.23 on.
    pub fn has_capabilities(self) -> bool {
        self >= Self::V1_7
    }

    /// As `containerd --version` says it.
    pub fn version(self) -> String {
        let said = run(self.program("containerd"), ["--version"]).ok();
        said.split_whitespace().nth(2).expect("it says its version").to_owned()
    }

    /// All that the documentation has for it, and what is left of an upgrade.
    pub fn ways(self) -> Vec<Way> {
        let client = if self.has_transfer() { Way::Client2 } else { Way::Client1 };
        let later = [Way::Transfer, Way::Upgraded].into_iter().filter(|_| self.has_transfer());
        let latest = [Way::ConfD].into_iter().filter(|_| self.has_conf_d());
        [client].into_iter().chain(later).chain(latest).collect()
    }

    /// The one that makes the most of it.
    pub fn best_way(self) -> Way {
        if self.has_transfer() { Way::Transfer } else { Way::Client1 }
    }
}

/// How containerd is told about the snapshotter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Client1,
    /// A file that was written for 1.x, as it stands on many nodes, with a table of runtimes.
    Upgraded,
    Client2,
    Transfer,
    /// As `Transfer`, with the plugin in the file that the packages bring.
    ConfD,
    /// As `Transfer`; where containerd can unpack several layers of an image at the same time, it
    /// may, but for a snapshotter that does not say it takes layers without their parents.
    ManyUnpacks,
    /// Nothing but the plugin, under the name that nerdctl's own page has for it.
    OtherName,
}

/// A main file of containerd, and what its folder `conf.d` holds.
pub struct Configuration {
    pub main: String,
    pub conf_d: Option<String>,
}

impl Way {
    /// As a user would have it, with our own places in it.
    pub fn configuration(self, socket: &Path, root: &Path) -> Configuration {
        let place = |text: String| placed(&text, socket, root);
        let snippet = |name: &str| place(read(&format!("docs/containerd/{name}")));
        let main = match self {
            Self::Client1 => snippet("client-1.toml"),
            Self::Upgraded => {
                let runtimes = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  \
                                runtime_type = \"io.containerd.runc.v2\"\n";
                snippet("client-1.toml") + runtimes
            }
            Self::Client2 => snippet("client-2.toml"),
            Self::Transfer => snippet("transfer.toml"),
            Self::ManyUnpacks => {
                let many = "[plugins.'io.containerd.transfer.v1.local']\n  max_concurrent_unpacks = 4\n";
                snippet("transfer.toml") + many
            }
            Self::ConfD => parted(&snippet("transfer.toml")).0.to_owned(),
            Self::OtherName => {
                let plugin = parted(&snippet("client-1.toml")).1.replace(OURS, "cvmfs");
                format!("version = 2\n{plugin}")
            }
        };
        let conf_d = (self == Self::ConfD).then(|| place(read("packaging/containerd-conf.d.toml")));
        Configuration { main, conf_d }
    }
}

/// A snippet up to the registration of the plugin, and from there.
fn parted(snippet: &str) -> (&str, &str) {
    snippet.split_at(snippet.find("[proxy_plugins").expect("a snippet registers the plugin"))
}

/// A file of this checkout.
pub fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()))
}

fn placed(text: &str, socket: &Path, root: &Path) -> String {
    let quoted = |path: &str| format!("\"{path}\"");
    assert!(text.contains(&quoted(SOCKET)) || !text.contains("address"), "another address than the default:\n{text}");
    text.replace(&quoted(SOCKET), &format!("{socket:?}")).replace(&quoted(STATE), &format!("{root:?}"))
}
