use super::*;

fn first(reference: &str) -> String {
    let paths = ImageRef::parse(reference).unwrap_or_else(|| panic!("{reference}")).manifests();
    paths[0].to_str().unwrap().to_owned()
}

#[test]
fn reference_names_the_paths_of_its_manifest() {
    let hex = "0".repeat(64);
    for (reference, path) in [
        ("docker.io/library/alpine:3", ".metadata/registry.hub.docker.com/library/alpine:3/manifest.json"),
        ("alpine", ".metadata/registry.hub.docker.com/library/alpine:latest/manifest.json"),
        ("docker.io/rootproject/root:6.32", ".metadata/registry.hub.docker.com/rootproject/root:6.32/manifest.json"),
        ("gitlab-registry.cern.ch/a/b/c:v1.2", ".metadata/gitlab-registry.cern.ch/a/b/c:v1.2/manifest.json"),
        ("127.0.0.1:5000/demo:1", ".metadata/127.0.0.1:5000/demo:1/manifest.json"),
        ("localhost/x", ".metadata/localhost/x:latest/manifest.json"),
        (&format!("ghcr.io/x/y@sha256:{hex}"), &format!(".metadata/ghcr.io/x/y@sha256:{hex}/manifest.json")),
        (&format!("ghcr.io/x/y:t@sha256:{hex}"), ".metadata/ghcr.io/x/y:t/manifest.json"),
    ] {
        assert_eq!(first(reference), path);
    }
    let hub = ImageRef::parse("docker.io/library/alpine:3").unwrap().manifests();
    assert_eq!(hub.len(), 8);
    assert!(hub.contains(&".metadata/docker.io/alpine:3/manifest.json".into()));
    assert_eq!(ImageRef::parse("ghcr.io/library/alpine:3").unwrap().manifests().len(), 1);
}

#[test]
fn text_that_is_not_a_reference_becomes_no_path() {
    for text in [
        "",
        "/",
        "..",
        "a/../b",
        "../../etc/passwd",
        "x.y/..",
        "x.y/a//b",
        "x.y/.a",
        "x.y/a.",
        "x.y/A",
        "x..y/a",
        "-x.y/a",
        "x.y:port/a",
        "x.y/a:",
        "x.y/a:.t",
        "x.y/a:t/../..",
        "x.y/a:t\0",
        "x.y/a:t\n",
        "x.y/a b",
        "x.y/a..b",
        "x.y/a___b",
        "x.y/a@sha256:12",
        "x.y/a@../..",
        &format!("x.y/a:{}", "t".repeat(129)),
        &format!("x.y/{}", "a".repeat(256)),
    ] {
        assert_eq!(ImageRef::parse(text), None, "{text:?}");
    }
    for text in ["x.y/a-b/c--d/e_f/g__h.i:T_1.0-rc", "a1/b2"] {
        assert!(ImageRef::parse(text).is_some(), "{text:?}");
    }
}

#[test]
fn manifest_is_parsed_in_both_spellings() {
    let d = |n: u8| format!("sha256:{}", format!("{n:02x}").repeat(32));
    let ducc = format!(
        r#"{{"SchemaVersion":2,"Config":{{"MediaType":"x","Size":1,"Digest":"{}"}},
             "Layers":[{{"MediaType":"y","Size":2,"Digest":"{}"}},{{"MediaType":"y","Size":2,"Digest":"{}"}}]}}"#,
        d(1),
        d(2),
        d(3)
    );
    let manifest = Manifest::parse(ducc.as_bytes()).unwrap();
    assert_eq!((manifest.config.as_str(), manifest.layers.len()), (d(1).as_str(), 2));
    let oci = ducc.replace("Config", "config").replace("Layers", "layers").replace("Digest", "digest");
    assert_eq!(Manifest::parse(oci.as_bytes()), Ok(manifest));
}

#[test]
fn invalid_manifest_is_refused_with_the_reason() {
    let deep = "[".repeat(100_000);
    let long = format!(r#"{{"Config":"{}"}}"#, "x".repeat(100_000));
    for (text, why) in [
        ("", "EOF while parsing"),
        ("{", "EOF while parsing"),
        (deep.as_str(), "it is no manifest"),
        (long.as_str(), "expected struct Descriptor"),
        ("{}", "missing field `config`"),
        (r#"{"Config":{}}"#, "missing field `digest`"),
        (r#"{"Config":{"Digest":"sha256:../../x"},"Layers":[]}"#, "64 hex digits"),
        (r#"{"Config":{"Digest":7},"Layers":[]}"#, "expected a string"),
    ] {
        let error = Manifest::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with("it is no manifest: ") && error.len() < 300, "{error}");
        assert!(error.contains(why) || text.len() > 1_000, "{error}");
    }
}

fn descriptor(n: usize) -> String {
    format!(r#"{{"digest":"sha256:{n:064x}"}}"#)
}

fn manifest_of(layers: &[String]) -> String {
    format!(r#"{{"config":{},"layers":[{}]}}"#, descriptor(0), layers.join(","))
}

#[test]
fn manifest_has_1024_layers_at_most() {
    let layers: Vec<String> = (0..=MAX_LAYERS).map(descriptor).collect();
    assert_eq!(Manifest::parse(manifest_of(&layers[1..]).as_bytes()).unwrap().layers.len(), MAX_LAYERS);
    assert_eq!(Manifest::parse(manifest_of(&layers).as_bytes()), Err(Invalid::TooManyLayers(MAX_LAYERS + 1)));
}

/// Names the only manifest that the test below parses, in a process of its own.
const CHILD: &str = "CVMFS_SNAPSHOTTER_TEST_MANIFEST";

/// Manifests that take as much memory as possible for their size.
fn worst_manifests() -> Vec<(&'static str, String)> {
    let most = usize::try_from(MAX_BYTES).unwrap();
    let fill = |each: &str| {
        let count = most / (each.len() + 1) - 50;
        manifest_of(&vec![each.to_owned(); count])
    };
    let unknown = |value: String| format!(r#"{{"x":{value},{}"#, &manifest_of(&[])[1..]);
    vec![
        ("layers", fill(&descriptor(1))),
        ("empty objects", fill(r#"{"":0}"#)),
        ("unknown objects", unknown(format!("[{}0]", r#"{"":0},"#.repeat(most / 7 - 50)))),
        ("unknown keys", unknown(format!("{{{}\"\":0}}", r#""":0,"#.repeat(most / 5 - 50)))),
        ("depth", unknown("[".repeat(most - 500))),
        ("one text", unknown(format!("\"{}\"", "\\n".repeat(most / 2 - 500)))),
    ]
}

/// A number of `/proc/self/status`, in KiB.
fn status(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
}

/// Parsed into a tree of values, 4 MiB took 390 MiB.
#[test]
fn manifest_takes_memory_in_proportion_to_its_size() {
    if let Ok(which) = std::env::var(CHILD) {
        let text = worst_manifests().swap_remove(which.parse().unwrap()).1;
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = status("VmRSS");
        let _ = Manifest::parse(text.as_bytes());
        eprintln!("{}", status("VmHWM").saturating_sub(before));
        return;
    }
    for (n, (name, text)) in worst_manifests().into_iter().enumerate() {
        assert!(text.len() <= usize::try_from(MAX_BYTES).unwrap(), "{name}: {}", text.len());
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let test = "repository::manifest::tests::manifest_takes_memory_in_proportion_to_its_size";
        let output = child.args(["--exact", test, "--nocapture"]).env(CHILD, n.to_string()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let kibibytes: usize = said.trim().parse().unwrap_or_else(|_| panic!("{said}"));
        println!("{name}: {} KiB of text, {kibibytes} KiB of memory", text.len() >> 10);
        assert!(kibibytes < 2 << 10, "{name}: {kibibytes} KiB");
    }
}
