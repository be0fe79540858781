//! The configuration that the documentation shows is that which the tests use.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use scene::machine::{SOCKET, STATE};
use scene::release::read;

/// The blocks of code in a page that are of TOML.
fn blocks(page: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block: Option<String> = None;
    for line in page.lines() {
        match &mut block {
            None if line == "```toml" => block = Some(String::new()),
            None => {}
            Some(_) if line == "```" => blocks.extend(block.take()),
            Some(text) => text.extend([line, "\n"]),
        }
    }
    assert!(block.is_none(), "a block does not end");
    blocks
}

/// The files that are shown, by name.
fn files() -> BTreeMap<String, String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/containerd");
    let names = fs::read_dir(dir).expect("the folder is there").map(|e| e.expect("an entry can be read").file_name());
    let names = names.map(|name| format!("docs/containerd/{}", name.display()));
    let names = names.chain(["packaging/containerd-conf.d.toml".to_owned()]);
    names.map(|name| (name.clone(), read(&name))).collect()
}

#[test]
fn containerd_page_shows_the_files_that_the_tests_use() {
    let files = files();
    let mut shown = Vec::new();
    for block in blocks(&read("docs/containerd.md")) {
        let file = files.iter().find(|(_, text)| **text == block);
        shown.push(file.unwrap_or_else(|| panic!("no file is exactly this:\n{block}")).0);
    }
    shown.sort();
    assert_eq!(shown, files.keys().collect::<Vec<_>>(), "each file is shown once");
}

#[test]
fn readme_shows_the_file_for_the_oldest_containerd() {
    let files = files();
    let blocks = blocks(&read("README.md"));
    assert!(blocks.contains(&files["docs/containerd/client-1.toml"]), "it shows {blocks:?}");
}

#[test]
fn every_documented_file_registers_the_plugin_at_default_paths() {
    for (name, text) in files() {
        if name.ends_with("nerdctl.toml") {
            continue;
        }
        let plugin = "[proxy_plugins.cvmfs-snapshotter]\n  type = \"snapshot\"\n";
        assert!(text.contains(&format!("{plugin}  address = \"{SOCKET}\"\n")), "{name}");
        assert!(text.contains(&format!("    root = \"{STATE}\"\n")), "{name}");
        assert_eq!(text.matches("[proxy_plugins").count(), 2, "{name}: the plugin and its exports");
    }
}
