//! Configurations of containerd in which something is wrong, made of the documentation's good ones: what
//! people forget, misspell, leave behind or copy from the wrong page.

use crate::containerd::PLUGIN_NAME;
use crate::e2e_fixture::E2eFixture;
use crate::release::{ConfigVariant, Configuration, Release};

pub const PROXY: &str = "[proxy_plugins.cvmfs-snapshotter]";
pub const EXPORTS: &str = "[proxy_plugins.cvmfs-snapshotter.exports]";
pub const UNPACK: &str = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]";
pub const SAYS: &str = "disable_snapshot_annotations = false";
pub const TOLD: &str = "enable_remote_snapshot_annotations = \"true\"";
pub const CRI_1: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]";
pub const CRI_2: &str = "[plugins.'io.containerd.cri.v1.images']";
pub const OF_CRI: &str = "snapshotter = \"cvmfs-snapshotter\"";

/// Each keeps containerd 2.1 and later from pulling by the transfer service. Lines of the CRI's table, or
/// a table.
pub const BY_CLIENT: [&str; 7] = [
    "use_local_image_pull = true",
    "discard_unpacked_layers = true",
    "image_pull_with_sync_fs = true",
    "max_concurrent_downloads = 10",
    "[plugins.'io.containerd.cri.v1.images'.registry.mirrors.'scene.test']\n  endpoint = [\"http://127.0.0.1:1\"]",
    "[plugins.'io.containerd.cri.v1.images'.registry.configs.'scene.test'.auth]\n  username = \"u\"",
    "[plugins.'io.containerd.cri.v1.images'.registry.auths.'http://scene.test']\n  username = \"u\"",
];

/// A platform that no node of the tests has.
pub fn other_platform() -> &'static str {
    if cfg!(target_arch = "aarch64") { "linux/amd64" } else { "linux/arm64" }
}

/// A file with something wrong.
pub struct Slip {
    pub name: String,
    pub configuration: Configuration,
    /// The check that must find it.
    pub check: Option<&'static str>,
}

/// A good file, and slips in it.
struct Good {
    way: ConfigVariant,
    release: Release,
    text: String,
    slips: Vec<Slip>,
}

impl Good {
    fn slip(&mut self, name: &str, check: impl Into<Option<&'static str>>, text: String) {
        assert_ne!(text, self.text, "{name} ({:?}) changes nothing", self.way);
        let name = format!("{:?}: {name}", self.way);
        let configuration = Configuration { main: text, conf_d: None };
        self.slips.push(Slip { name, configuration, check: check.into() });
    }

    fn replace(&mut self, check: impl Into<Option<&'static str>>, from: &str, to: &str) {
        assert!(self.text.contains(from), "{from} is not in {}", self.text);
        let text = self.text.replace(from, to);
        self.slip(&format!("{from} -> {to}"), check, text);
    }

    /// In `way`, if this version has what is checked.
    fn replace_if(&mut self, is_meant: bool, check: &'static str, from: &str, to: &str) {
        if is_meant {
            self.replace(check, from, to);
        }
    }

    /// A line below another one.
    fn below(&mut self, check: impl Into<Option<&'static str>>, line: &str, more: &str) {
        self.replace(check, line, &format!("{line}\n{more}"));
    }

    fn has(&self, text: &str) -> bool {
        self.text.contains(text)
    }
}

/// Without what a person skips.
pub fn bare(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// In each file that the documentation has for this version.
pub fn slips(release: Release, stage: &E2eFixture) -> Vec<Slip> {
    let ways = release.config_variants().into_iter().filter(|way| *way != ConfigVariant::ConfD);
    let mut all: Vec<Slip> = ways.flat_map(|way| of_way(way, release, stage)).collect();
    all.extend(imported(release, stage));
    all
}

fn of_way(way: ConfigVariant, release: Release, stage: &E2eFixture) -> Vec<Slip> {
    let (socket, root) = (stage.snapshotter.socket(), stage.snapshotter.root());
    let configuration = way.configuration(&socket, &root);
    let mut good = Good { way, release, text: bare(&configuration.main), slips: Vec::new() };
    let (socket, root) = (format!("address = {socket:?}"), format!("root = {root:?}"));
    one_by_one(&mut good, &socket, &root);
    of_the_cri(&mut good);
    // `Transfer` has all that `Client2` has here.
    if way != ConfigVariant::Client2 {
        of_lists_of_plugins(&mut good);
        without_headings(&mut good, &socket, &root);
    }
    of_the_transfer_service(&mut good);
    several(&mut good, &socket, &root);
    // Whatever else somebody may delete.
    let lines: Vec<String> = good.text.lines().map(str::to_owned).collect();
    for (n, gone) in lines.iter().enumerate() {
        let rest = [&lines[..n], &lines[n + 1..]].concat().join("\n") + "\n";
        good.slip(&format!("without line {}, {gone}", n + 1), None, rest);
    }
    good.slips
}

fn one_by_one(good: &mut Good, socket: &str, root: &str) {
    let release = good.release;
    let kind = "type = \"snapshot\"";
    good.replace("containerd.type", &format!("{kind}\n"), "");
    good.replace("containerd.type", kind, "type = \"snapshots\"");
    good.replace("containerd.type", kind, "type = \"content\"");
    good.replace("containerd.plugin", &format!("{socket}\n"), "");
    good.replace("containerd.plugin", socket, "address = \"/run/other.sock\"");
    let scheme = socket.replace("\"/", "\"unix:///");
    good.replace((release == Release::V1_7).then_some("containerd.plugin"), socket, &scheme);
    good.replace("containerd.plugin", PROXY, "[proxy_plugins.cvmfs]");
    good.replace("containerd.plugin", "[proxy_plugins.cvmfs-snapshotter", "[proxy_plugins.cvmfs");
    good.replace("containerd.plugin", PLUGIN_NAME, "cvmfs");
    // A rest of what was renamed.
    good.replace("containerd.type", EXPORTS, "[proxy_plugins.cvmfs.exports]");
    good.below(
        release.has_capabilities().then_some("containerd.capabilities"),
        socket,
        "capabilities = [\"remap-ids\"]",
    );
    good.below(
        release.has_conf_d().then_some("containerd.capabilities"),
        socket,
        "capabilities = [\"content\", \"rebase\"]",
    );
    let exports = release.has_exports();
    good.replace_if(exports, "containerd.exports", root, "root = \"/var/lib/other\"");
    good.replace_if(exports, "containerd.exports", &format!("{root}\n"), "");
    if let Some(version) = good.text.lines().next().filter(|line| line.starts_with("version")).map(str::to_owned) {
        let is_1 = release < Release::V2_1;
        good.replace(is_1.then_some("containerd.format"), &format!("{version}\n"), "");
        good.replace(is_1.then_some("containerd.format"), &version, "version = 1");
        good.replace(is_1.then_some("containerd.format"), &version, "version = 0");
        good.replace((release != Release::V1_6).then_some("containerd.format"), &version, "version = 7");
    }
}

fn of_the_cri(good: &mut Good) {
    let table = if good.has(CRI_1) { CRI_1 } else { CRI_2 };
    if !good.has(table) {
        return;
    }
    let release = good.release;
    let text = good.text.replacen(&format!("{OF_CRI}\n"), "", 1);
    good.slip("the CRI's snapshotter is missing", "containerd.snapshotter", text);
    let text = good.text.replacen(OF_CRI, "snapshotter = \"overlayfs\"", 1);
    good.slip("the CRI's snapshotter is another one", "containerd.snapshotter", text);
    // The other one's table, as after an upgrade, or a copy from the wrong page.
    let other = if table == CRI_1 { CRI_2 } else { CRI_1 };
    let is_found = table == CRI_2 || release < Release::V2_1;
    good.replace(is_found.then_some("containerd.snapshotter"), table, other);
    if good.has(SAYS) {
        let says = "containerd.annotations";
        good.replace(says, &format!("{SAYS}\n"), "");
        good.replace(says, SAYS, "disable_snapshot_annotations = true");
    }
    if release >= Release::V2_1 && table == CRI_2 {
        let is_found = !good.has(SAYS);
        for key in BY_CLIENT {
            let check = is_found.then_some("containerd.annotations");
            if key.starts_with('[') {
                let text = format!("{}{key}\n", good.text);
                good.slip(key, check, text);
            } else {
                good.below(check, CRI_2, key);
            }
        }
        good.below(None, CRI_2, "max_concurrent_downloads = 3");
    }
    if good.way == ConfigVariant::Upgraded {
        let text = good
            .text
            .replace(&format!("{SAYS}\n"), "")
            .replace(CRI_1, &format!("{CRI_1}\ndiscard_unpacked_layers = true"));
        good.slip("the old table has a key for the client", "containerd.annotations", text);
        // Passed over without runtimes.
        let text = good
            .text
            .split("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes")
            .next()
            .unwrap_or_default()
            .to_owned();
        good.slip("no runtimes", "containerd.snapshotter", text);
    }
}

/// Tables in braces and dotted keys.
fn without_headings(good: &mut Good, socket: &str, root: &str) {
    let exports = good.release.has_exports().then_some("containerd.exports");
    let table = format!("{PROXY}\ntype = \"snapshot\"\n{socket}\n");
    let below = if good.has(TOLD) { format!("{EXPORTS}\n{root}\n{TOLD}\n") } else { format!("{EXPORTS}\n{root}\n") };
    let braces = |socket: &str| format!("[proxy_plugins]\ncvmfs-snapshotter = {{ type = \"snapshot\", {socket} }}\n");
    let registration = format!("{table}{below}");
    good.replace(exports, &registration, &braces(socket));
    good.replace("containerd.plugin", &registration, &braces("address = \"/run/other.sock\""));
    good.replace(exports, &below, "exports.root = \"/var/lib/other\"\nexports.other = \"x\"\n");
    if !good.has(CRI_1) {
        return;
    }
    let (says, cri) = ("containerd.annotations", "[plugins.\"io.containerd.grpc.v1.cri\"]");
    let old = format!("{CRI_1}\n{OF_CRI}\n{SAYS}\n");
    good.replace(says, &old, &format!("{cri}\ncontainerd.{OF_CRI}\n"));
    good.replace("containerd.snapshotter", &old, &format!("{cri}\ncontainerd.{SAYS}\n"));
    // Braces take no heading of runtimes.
    if good.way == ConfigVariant::Client1 {
        good.replace(says, &old, &format!("{cri}\ncontainerd = {{ {OF_CRI} }}\n"));
        good.replace("containerd.snapshotter", &old, &format!("{cri}\ncontainerd = {{ {SAYS} }}\n"));
    }
}

fn of_lists_of_plugins(good: &mut Good) {
    let is_1 = good.release < Release::V2_1;
    let Some((version, rest)) = good.text.split_once('\n').map(|(head, rest)| (head.to_owned(), rest.to_owned()))
    else {
        return;
    };
    // As Docker's containerd.io brings it.
    let docker = "disabled_plugins = [\"cri\"]";
    let several = "disabled_plugins = [\n  \"zfs\", \"cri\",\n  \"strange\",\n]\nrequired_plugins = ['cri']";
    let old = if is_1 { "containerd.format" } else { "containerd.parts" };
    if good.has(CRI_1) {
        good.slip("Docker's list and no version", old, format!("{docker}\n{rest}"));
        good.slip("lists and version 1", old, format!("version = 1\n{several}\n{rest}"));
    }
    good.slip("Docker's list", "containerd.format", format!("{version}\n{docker}\n{rest}"));
    good.slip("lists of short names", "containerd.format", format!("{version}\n{several}\n{rest}"));
    let long = "disabled_plugins = ['io.containerd.snapshotter.v1.zfs', 'io.containerd.grpc.v1.cri']";
    good.slip("no CRI", "containerd.parts", format!("{version}\n{long}\n{rest}"));
    let ours =
        "disabled_plugins = ['io.containerd.snapshotter.v1.zfs', 'io.containerd.snapshotter.v1.cvmfs-snapshotter']";
    good.slip("disabled", "containerd.disabled", format!("{version}\n{ours}\n{rest}"));
    let both = "disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.snapshotter.v1.cvmfs-snapshotter']";
    good.slip("disabled, and no CRI", "containerd.disabled", format!("{version}\n{both}\n{rest}"));
    if !is_1 {
        let transfer = "disabled_plugins = ['io.containerd.transfer.v1.local']";
        good.slip("no transfer service", "containerd.disabled", format!("{version}\n{transfer}\n{rest}"));
    }
    let named = rest.replacen(&format!("{OF_CRI}\n"), "", 1);
    good.slip("no CRI, and nobody names us", "containerd.parts", format!("{version}\n{long}\n{named}"));
    if !is_1 {
        let parts = "disabled_plugins = ['io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime']";
        good.slip("no CRI of containerd 2", "containerd.parts", format!("{version}\n{parts}\n{rest}"));
    }
}

fn of_the_transfer_service(good: &mut Good) {
    if !good.has(UNPACK) {
        return;
    }
    let ours = format!("{UNPACK}\nplatform = \"linux\"\n{OF_CRI}\n");
    let overlayfs = ours.replace(PLUGIN_NAME, "overlayfs");
    let (platform, missing) = ("containerd.platform", "containerd.annotations");
    good.replace(missing, &ours, "");
    good.replace(missing, &format!("{ours}{overlayfs}"), "");
    good.replace(None, &overlayfs, "");
    good.replace(platform, &ours, &ours.replace("linux", other_platform()));
    good.replace(platform, &ours, &ours.replace("platform = \"linux\"\n", ""));
    good.replace(platform, &ours, &ours.replace("linux", "windows"));
    good.replace(
        None,
        &ours,
        &ours.replace("linux", if cfg!(target_arch = "aarch64") { "linux/aarch64" } else { "linux/x86_64" }),
    );
    good.replace(missing, &format!("{TOLD}\n"), "");
    good.replace(missing, TOLD, "enable_remote_snapshot_annotations = \"false\"");
    // Not a text: containerd refuses the whole file.
    good.replace(missing, TOLD, "enable_remote_snapshot_annotations = true");
    let list = "[plugins.'io.containerd.transfer.v1.local']\nunpack_config = [{platform = \"linux\", snapshotter = \"overlayfs\"}]\n";
    good.replace(missing, &format!("{ours}{overlayfs}"), list);
}

fn several(good: &mut Good, socket: &str, root: &str) {
    let release = good.release;
    let proxy = good.text.find(PROXY).expect("a file registers the plugin");
    let rest = good.text.find("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes").unwrap_or(good.text.len());
    let registration = good.text[proxy..rest.max(proxy)].to_owned();
    let text = good.text.replace(&registration, "");
    good.slip("no registration", "containerd.plugin", text.clone());
    let without_says = text.replace(&format!("{SAYS}\n"), "");
    if without_says != text {
        good.slip("no registration, and the client says nothing", "containerd.plugin", without_says);
    }
    if good.has(UNPACK) {
        let text = good.text.replace(&format!("{EXPORTS}\n{root}\n{TOLD}\n"), "");
        good.slip("no exports", "containerd.exports", text.clone());
        good.slip("no exports and no type", "containerd.type", text.replace("type = \"snapshot\"\n", ""));
        let at = text.find(UNPACK).expect("it has one");
        let end = text.find(PROXY).expect("it has one");
        good.slip(
            "no exports and no unpack_config",
            "containerd.annotations",
            format!("{}{}", &text[..at], &text[end..]),
        );
        let text = good
            .text
            .replace(&format!("{root}\n"), "")
            .replace("platform = \"linux\"", &format!("platform = \"{}\"", other_platform()));
        good.slip("no root, and every platform is another one", "containerd.platform", text.replace(TOLD, ""));
    }
    if release.has_exports() {
        let text = good.text.replace(&format!("{EXPORTS}\n{root}\n"), "");
        if text != good.text && !good.has(TOLD) {
            good.slip(
                "no exports and another address",
                "containerd.plugin",
                text.replace(socket, "address = \"/run/x.sock\""),
            );
        }
    }
    let text = good.text.replace("type = \"snapshot\"\n", "").replace(&format!("{socket}\n"), "");
    good.slip("neither type nor address", "containerd.type", text.clone());
    good.slip("no heading but that of exports", "containerd.plugin", text.replace(&format!("{PROXY}\n"), ""));
    let text = good.text.replace(PROXY, "[proxy_plugins.stargz]").replace("type = \"snapshot\"", "type = \"content\"");
    good.slip("another name, and another type", "containerd.plugin", text);
    good.slip(
        "nothing but a version",
        "containerd.plugin",
        good.text.lines().next().unwrap_or_default().to_owned() + "\n",
    );
    good.slip("nothing", "containerd.plugin", "# Nothing.\n".to_owned());
}

/// In the file that a package brings, which the main one imports.
fn imported(release: Release, stage: &E2eFixture) -> Vec<Slip> {
    if !release.has_conf_d() {
        return Vec::new();
    }
    let root = stage.snapshotter.root();
    let good = ConfigVariant::ConfD.configuration(&stage.snapshotter.socket(), &root);
    let of_package = good.conf_d.expect("this way has a file of its own");
    let slip = |name: &str, check, from: &str, to: &str| {
        assert!(of_package.contains(from), "{from} is not in {of_package}");
        let configuration = Configuration { main: good.main.clone(), conf_d: Some(of_package.replace(from, to)) };
        Slip { name: format!("imported: {name}"), configuration, check: Some(check) }
    };
    let mut all = vec![
        slip("another root", "containerd.exports", &format!("{root:?}"), "\"/var/lib/other\""),
        slip("annotations", "containerd.annotations", TOLD, ""),
        slip("type", "containerd.type", "type = \"snapshot\"", ""),
        slip("name", "containerd.plugin", PLUGIN_NAME, "cvmfs"),
    ];
    let cri = format!("disabled_plugins = [\"io.containerd.cri.v1.images\"]\n{PROXY}");
    all.push(slip("no CRI", "containerd.parts", PROXY, &cri));
    all
}
