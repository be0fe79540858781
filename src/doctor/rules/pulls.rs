//! Whether Kubernetes uses this snapshotter, and whether containerd then says which layers it pulls: by the CRI's client, or
//! from 2.1 on by its transfer service.
#![forbid(unsafe_code)]

use std::env::consts::ARCH;

use super::{Consumer, EXPORTS_TABLE, Finding, NAME, PAGE, RuleContext, Setting};
use crate::doctor::config::{Proxy, Unpack};

const SNAPSHOTTER_LINE: &str = "snapshotter = \"cvmfs-snapshotter\"";
const CLIENT_LINE: &str = "disable_snapshot_annotations = false";
/// The export that makes the transfer service tell a snapshotter which layers it pulls. Its value is a text.
const ANNOTATIONS_KEY: &str = "enable_remote_snapshot_annotations";
pub const ANNOTATIONS_LINE: &str = "enable_remote_snapshot_annotations = \"true\"";
const UNPACK_TABLE: &str = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]";
/// The end of containerd's message when no `unpack_config` is for the snapshotter.
const NO_PLATFORM: &str = "\"no unpack platforms defined\"";

impl RuleContext<'_> {
    pub(super) fn check_snapshotter(&self, findings: &mut Vec<Finding>) -> Consumer {
        const CHECK: &str = "containerd.snapshotter";
        let used = self.config.snapshotter();
        if used == Some(NAME) {
            findings.push(Finding::good(CHECK, format!("Kubernetes' containers use {NAME}")));
            return Consumer::Kubernetes;
        }
        let other = used.filter(|name| !name.is_empty()).unwrap_or("containerd's own snapshotter");
        let Some(table) = self.file_table else {
            let version = if self.version.major < 2 { ", below version = 2 as the first line" } else { "" };
            findings.push(Finding::note(
                CHECK,
                format!(
                    "Kubernetes' containers use {other}; only clients that name {NAME} get it (nerdctl --snapshotter). To \
                     change that, set {SNAPSHOTTER_LINE} in table {} of {}{version}",
                    self.cri_table(),
                    self.file
                ),
            ));
            return Consumer::Others;
        };
        let lines =
            if self.version.has_transfer() { &[SNAPSHOTTER_LINE][..] } else { &[SNAPSHOTTER_LINE, CLIENT_LINE] };
        findings.push(Finding::problem(
            CHECK,
            format!("{} names {NAME} in {table}, but this containerd ignores that table, and Kubernetes uses {other}; {PAGE} has whole files for each version", self.file),
            self.cri_remedy(lines),
        ));
        Consumer::Kubernetes
    }

    pub(super) fn check_annotations(&self, proxy: Option<&Proxy>, consumer: Consumer, findings: &mut Vec<Finding>) {
        const CHECK: &str = "containerd.annotations";
        let by_client = self.config.has_client_annotations();
        let is_kubernetes = consumer == Consumer::Kubernetes;
        // The remedy of containerd.snapshotter sets the line as well.
        let is_ignored = is_kubernetes && self.config.snapshotter() != Some(NAME);
        if !self.version.has_transfer() {
            if by_client {
                findings.push(Finding::good(CHECK, "containerd says which layers Kubernetes pulls"));
            } else if is_kubernetes && !is_ignored {
                let message = "containerd does not say which layers Kubernetes pulls: every layer is downloaded";
                findings.push(Finding::problem(CHECK, message, self.cri_remedy(&[CLIENT_LINE])));
            }
            return;
        }
        if let (true, false, Some(setting)) = (is_kubernetes, by_client, self.config.client_pull_setting()) {
            let message = format!(
                "{setting} makes containerd pull by its client, which does not say which layers Kubernetes pulls: every \
                 layer is downloaded"
            );
            findings.push(Finding::problem(CHECK, message, self.cri_remedy(&[CLIENT_LINE])));
            return;
        }
        self.check_transfer(proxy, consumer, findings);
    }

    fn check_transfer(&self, proxy: Option<&Proxy>, consumer: Consumer, findings: &mut Vec<Finding>) {
        const CHECK: &str = "containerd.annotations";
        // The remedy of a registration that is missing has the line.
        let is_told = proxy.is_none_or(|proxy| proxy.exports.get(ANNOTATIONS_KEY).map(String::as_str) == Some("true"));
        let unpacks = self.config.unpack_config().is_some_and(|all| all.iter().any(|one| one.snapshotter == NAME));
        if is_told && unpacks {
            findings.push(Finding::good(CHECK, "containerd's transfer service says which layers are pulled"));
            return;
        }
        let mut settings = Vec::new();
        if !is_told {
            settings.push(Setting::new(EXPORTS_TABLE, &[ANNOTATIONS_LINE]));
        }
        if !unpacks {
            // The first entry replaces containerd's default list.
            let names: &[&str] = if self.config.unpack_config().is_none() { &[NAME, "overlayfs"] } else { &[NAME] };
            for name in names {
                let snapshotter = format!("snapshotter = \"{name}\"");
                settings.push(Setting::new(UNPACK_TABLE, &["platform = \"linux\"", &snapshotter]));
            }
        }
        let others = "\"ctr images pull\" and nerdctl 2.3 and later";
        let consequence = if unpacks { "download every layer".to_owned() } else { format!("stop with {NO_PLATFORM}") };
        findings.push(match consumer {
            Consumer::Kubernetes if self.config.has_client_annotations() => Finding::note(
                CHECK,
                format!("containerd says which layers Kubernetes pulls, by its client; {others}, which use the transfer service, {consequence}"),
            ),
            Consumer::Kubernetes if unpacks => Finding::problem(
                CHECK,
                "containerd's transfer service does not say which layers are pulled: every layer is downloaded",
                self.remedy(&settings),
            ),
            Consumer::Kubernetes => Finding::problem(
                CHECK,
                format!("containerd's transfer service is not told to unpack for {NAME}: every pull of Kubernetes fails with {NO_PLATFORM}"),
                self.remedy(&settings),
            ),
            Consumer::Others => Finding::warning(
                CHECK,
                format!("the transfer service is not set up for this snapshotter: {others} {consequence}"),
                self.remedy(&settings),
            ),
        });
    }

    /// An entry for another machine than this one keeps containerd from unpacking for us.
    pub(super) fn check_platforms(&self, findings: &mut Vec<Finding>) {
        if !self.version.has_transfer() {
            return;
        }
        let ours = self.config.unpack_config().unwrap_or_default().iter().filter(|one| one.snapshotter == NAME);
        for Unpack { platform, optional, .. } in ours.filter(|one| !is_our_platform(&one.platform)) {
            let consequence = if *optional && !platform.is_empty() {
                "containerd ignores it"
            } else {
                "containerd's transfer service does not start with it, and so the CRI does not either"
            };
            findings.push(Finding::problem(
                "containerd.platform",
                format!(
                    "an unpack_config for {NAME} has the platform {platform:?}, and this node is linux/{}: {consequence}",
                    architecture()
                ),
                format!(
                    "in {}, in the {UNPACK_TABLE} with {SNAPSHOTTER_LINE}: platform = \"linux\", then {}",
                    self.file,
                    super::RESTART
                ),
            ));
        }
    }
}

/// containerd's name for it.
fn architecture() -> &'static str {
    match ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `linux`, `linux/amd64` and the like, in the spellings that containerd takes for the same.
fn is_our_platform(platform: &str) -> bool {
    let platform = platform.to_ascii_lowercase();
    let (system, rest) = platform.split_once('/').unwrap_or((&platform, ""));
    let system = system.split('(').next().unwrap_or_default();
    let is_ours = |name: &str| match name {
        "x86_64" | "x86-64" => architecture() == "amd64",
        "aarch64" => architecture() == "arm64",
        name => name == architecture(),
    };
    let machine = rest.split('/').next().unwrap_or_default();
    system == "linux" && (rest.is_empty() || is_ours(machine)) || rest.is_empty() && is_ours(system)
}
