//! Versions of containerd that `tests/setup.sh` installs, each with its own programs, and the variants of a configuration
//! that registers the snapshotter, which are the files of `docs/containerd`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::containerd::PLUGIN_NAME;
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

    /// The directory of its programs: containerd, ctr, the shim and runc.
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

    /// Whether images are pulled by the transfer service in containerd, which uses the snapshotter that its configuration
    /// names, and not the one that the client names.
    pub fn has_transfer(self) -> bool {
        self >= Self::V2_1
    }

    /// Whether the default configuration imports `/etc/containerd/conf.d`, so the registration can be a file there.
    pub fn has_conf_d(self) -> bool {
        self >= Self::V2_2
    }

    /// Whether it passes on the exports of a proxy plugin, which Debian's 1.6 is too old for.
    pub fn has_exports(self) -> bool {
        self >= Self::V1_7
    }

    /// Whether it passes on the capabilities of a proxy plugin, as 1.7.23 and later do.
    pub fn has_capabilities(self) -> bool {
        self >= Self::V1_7
    }

    /// The full version, from `containerd --version`.
    pub fn version(self) -> String {
        let output = run(self.program("containerd"), ["--version"]).ok();
        output.split_whitespace().nth(2).expect("containerd prints its version").to_owned()
    }

    /// The variants that the documentation has for this version, and the one that an upgrade leaves behind.
    pub fn config_variants(self) -> Vec<ConfigVariant> {
        let client = if self.has_transfer() { ConfigVariant::Client2 } else { ConfigVariant::Client1 };
        let later = [ConfigVariant::Transfer, ConfigVariant::Upgraded].into_iter().filter(|_| self.has_transfer());
        let latest = [ConfigVariant::ConfD].into_iter().filter(|_| self.has_conf_d());
        [client].into_iter().chain(later).chain(latest).collect()
    }

    /// The variant that uses the most features of this version.
    pub fn best_config_variant(self) -> ConfigVariant {
        if self.has_transfer() { ConfigVariant::Transfer } else { ConfigVariant::Client1 }
    }
}

/// How containerd is told about the snapshotter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigVariant {
    /// `client-1.toml`: the client pulls, in 1.x.
    Client1,
    /// `client-1.toml` and a table of runtimes, in 2.x: a file that an upgrade of containerd has left on many nodes.
    Upgraded,
    /// `client-2.toml`: the client pulls, in 2.x.
    Client2,
    /// `transfer.toml`: the transfer service pulls.
    Transfer,
    /// `transfer.toml`, with the registration in the file that the packages install.
    ConfD,
    /// `transfer.toml` and the permission to unpack several layers of an image at the same time. containerd does so only
    /// for a snapshotter that declares that it takes layers without their parents.
    ManyUnpacks,
    /// Nothing but the registration, under the name that nerdctl's page has for it.
    OtherName,
}

/// A main file of containerd, and the content of a file in its directory `conf.d`.
pub struct Configuration {
    pub main: String,
    pub conf_d: Option<String>,
}

impl ConfigVariant {
    /// The files as a user would write them, with the given socket and state root.
    pub fn configuration(self, socket: &Path, root: &Path) -> Configuration {
        let with_paths = |text: String| with_paths(&text, socket, root);
        let snippet = |name: &str| with_paths(read(&format!("docs/containerd/{name}")));
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
            Self::ConfD => split_at_registration(&snippet("transfer.toml")).0.to_owned(),
            Self::OtherName => {
                let plugin = split_at_registration(&snippet("client-1.toml")).1.replace(PLUGIN_NAME, "cvmfs");
                format!("version = 2\n{plugin}")
            }
        };
        let conf_d = (self == Self::ConfD).then(|| with_paths(read("packaging/containerd-conf.d.toml")));
        Configuration { main, conf_d }
    }
}

/// Splits a snippet before the registration of the plugin.
fn split_at_registration(snippet: &str) -> (&str, &str) {
    snippet.split_at(snippet.find("[proxy_plugins").expect("a snippet registers the plugin"))
}

/// A file of this checkout.
pub fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()))
}

/// Replaces the default paths in a text.
fn with_paths(text: &str, socket: &Path, root: &Path) -> String {
    let quoted = |path: &str| format!("\"{path}\"");
    assert!(text.contains(&quoted(SOCKET)) || !text.contains("address"), "another address than the default:\n{text}");
    text.replace(&quoted(SOCKET), &format!("{socket:?}")).replace(&quoted(STATE), &format!("{root:?}"))
}
