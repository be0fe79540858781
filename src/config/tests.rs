use super::*;

fn read(text: &str) -> Result<LoadedConfig, String> {
    parse(Path::new("config.toml"), text).map_err(|e| e.to_string())
}

/// The start waited for the writer of a FIFO for ever, and `/dev/zero` took all memory.
#[test]
fn file_that_is_huge_or_not_regular_is_refused_with_path_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let load = |path: &Path| super::load(Some(path)).map_err(|e| e.to_string());
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let longest = usize::try_from(file::MAX_BYTES).unwrap();
    let huge = dir.path().join("huge");
    std::fs::write(&huge, "#".repeat(longest + 1)).unwrap();
    for (path, why) in [
        (fifo.as_path(), "it is a FIFO and no regular file"),
        (dir.path(), "it is a directory and no regular file"),
        (Path::new("/dev/zero"), "it is a device and no regular file"),
        (&huge, "it has more than 1048576 bytes"),
    ] {
        let error = load(path).unwrap_err();
        assert!(error.starts_with(&format!("cannot read the configuration {}: {why}", path.display())), "{error}");
        assert!(error.ends_with("with --config") && !error.contains('\n'), "{error}");
    }
    std::fs::write(&huge, "#".repeat(longest)).unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&huge, &link).unwrap();
    for path in [&huge, &link, Path::new("/dev/null")] {
        assert_eq!(load(path), Ok(LoadedConfig::default()), "{}", path.display());
    }
    let without_size = load(Path::new("/proc/self/cmdline")).unwrap_err();
    assert!(without_size.contains("not TOML"), "{without_size}");
    std::fs::write(&huge, [b'#', 0xff]).unwrap();
    assert!(load(&huge).unwrap_err().ends_with("huge: it is not UTF-8"));
    assert!(load(&dir.path().join("none")).unwrap_err().contains("No such file"));
}

#[test]
fn packaged_file_documents_every_key_with_its_default() {
    let packaged = include_str!("../../packaging/config.toml");
    assert_eq!(read(packaged), Ok(LoadedConfig::default()));
    // Every key stands in the file as a comment with its default. With those comments made into settings, the file
    // must still mean the defaults, and have no unknown key.
    let uncommented: String = packaged
        .lines()
        .map(|line| {
            line.strip_prefix("#").filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase())).unwrap_or(line)
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let loaded = read(&uncommented).unwrap();
    assert_eq!(loaded.unknown, []);
    // Without the key, the number of workers depends on the machine; the file says the smallest default.
    assert_eq!(loaded.config.workers, Some(MIN_DEFAULT_WORKERS));
    let defaults = Config { workers: loaded.config.workers, log_level: Some(LevelFilter::Info), ..Config::default() };
    assert_eq!(loaded.config, defaults);
    for key in KEYS {
        assert!(uncommented.contains(&format!("\n{key} = ")), "{key} is not documented");
    }
}

#[test]
fn repository_keys_mean_what_they_mean_to_the_go_snapshotter() {
    let (osg, packed) = ("singularity.opensciencegrid.org", "unpacked.cern.ch");
    for (text, expected) in [
        (
            "repository = \"singularity.opensciencegrid.org\"\nabsolute-mountpoint = \"\"\n",
            vec![(osg, "/cvmfs/singularity.opensciencegrid.org")],
        ),
        ("absolute-mountpoint = \"/mnt/a\"", vec![(packed, "/mnt/a")]),
        ("", vec![(packed, "/cvmfs/unpacked.cern.ch")]),
        ("repositories = []", vec![(packed, "/cvmfs/unpacked.cern.ch")]),
        ("repositories = [\"a.b\", \"/mnt/x\"]", vec![("a.b", "/cvmfs/a.b"), ("/mnt/x", "/mnt/x")]),
        (
            "repositories = [\"a.b\"]\nrepository = \"c.d\"\nabsolute-mountpoint = \"/mnt/c\"",
            vec![("c.d", "/mnt/c"), ("a.b", "/cvmfs/a.b")],
        ),
    ] {
        let repositories = read(text).unwrap().config.repositories;
        let repositories: Vec<_> = repositories.iter().map(|r| (r.name.as_str(), r.path.to_str().unwrap())).collect();
        assert_eq!(repositories, expected, "{text}");
    }
}

#[test]
fn repositories_that_contradict_each_other_are_refused() {
    for (text, message) in [
        (
            "repositories = [\"a.b\", \"a.b\"]",
            "line 1: invalid value [\"a.b\", \"a.b\"] for repositories: \"a.b\" is named twice",
        ),
        (
            "repository = \"a.b\"\nrepositories = [\"/cvmfs/a.b\"]",
            "line 2: invalid value [\"/cvmfs/a.b\"] for repositories: \"/cvmfs/a.b\" is named twice",
        ),
        (
            "absolute-mountpoint = \"/m\"\nrepositories = [\"a.b\"]",
            "line 1: invalid value \"/m\" for absolute-mountpoint: it is the path of \"repository\"",
        ),
    ] {
        let error = read(text).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}

/// Such addresses were accepted, and the daemon served without metrics, or on a port that nobody knew.
#[test]
fn metrics_address_that_cannot_be_served_is_refused() {
    let long = |bytes: usize| format!("/{}", "s".repeat(bytes - 1));
    let read = |address: &str| read(&format!("metrics-address = {address:?}")).map(|loaded| loaded.config.metrics);
    for (address, why) in [
        ("127.0.0.1:0", "expected a port from 1 to 65535"),
        ("[::]:0", "expected a port from 1 to 65535"),
        ("127.0.0.1", "expected an IP address with a port"),
        ("localhost:9812", "expected an IP address with a port"),
        ("relative.sock", "expected an IP address with a port"),
        (&long(MAX_SOCKET_PATH + 1), "expected the path of a socket of at most 107 bytes"),
        ("/run/metrics/", "without a slash at the end"),
        ("/", "without a slash at the end"),
        ("/run/a%41", "without %, # and ?"),
    ] {
        let error = read(address).unwrap_err();
        let names_it =
            error.starts_with(&format!("config.toml, line 1: invalid value {address:?} for metrics-address: expected"));
        assert!(names_it && error.contains(why), "{error}");
    }
    for address in ["127.0.0.1:1", "[::1]:65535"] {
        assert_eq!(read(address), Ok(Some(MetricsAddress::Tcp(address.parse().unwrap()))));
    }
    let longest = long(MAX_SOCKET_PATH);
    assert_eq!(read(&longest), Ok(Some(MetricsAddress::Unix(PathBuf::from(longest)))));
    assert_eq!(read(""), Ok(None));
}

#[test]
fn unknown_keys_are_named_with_their_lines() {
    let loaded = read("version = 2\nrepository = \"r\"\n\n[plugins.x]\n  y = 1\n[proxy_plugins]\n").unwrap();
    let shown: Vec<String> = loaded.unknown.iter().map(ToString::to_string).collect();
    assert_eq!(loaded.config.repositories, [RepositoryConfig::from_name("r")]);
    assert_eq!(
        shown,
        [
            "line 1: unknown key \"version\" (ignored)",
            "line 4: unknown key \"plugins\" (ignored)",
            "line 6: unknown key \"proxy_plugins\" (ignored)"
        ]
    );
}

#[test]
fn wrong_value_is_refused_with_key_value_line_and_remedy() {
    assert_eq!(
        read("repository = \"r\"\nattach = \"copy\""),
        Err("config.toml, line 2: invalid value \"copy\" for attach: expected \"bind\" or \"symlink\"".to_owned())
    );
    for text in [
        "repository = 5",
        "repository = \"\"",
        "repository = \"../etc\"",
        "repository = \"a/b\"",
        "repository = \"..\"",
        "absolute-mountpoint = \"relative\"",
        "absolute-mountpoint = \"/a/../b\"",
        "absolute-mountpoint = \"/a:b\"",
        "absolute-mountpoint = true",
        "repositories = \"a\"",
        "repositories = [\"../a\"]",
        "repositories = [\"/a:b\"]",
        "repositories = [\"/\"]",
        "repositories = [\"a..b\"]",
        "repository = \"a.\"",
        "repositories = [1]",
        "repository-timeout = 0",
        "repository-timeout = \"10s\"",
        "attach = 1",
        "workers = 0",
        "workers = 257",
        "workers = -1",
        "workers = 99999999999999999999",
        "workers = \"4\"",
        "queue = 0",
        "queue = 1.5",
        "log-format = \"xml\"",
        "log-level = \"loud\"",
        "log-level = 1",
        "allowed-uids = 1",
        "allowed-uids = [\"root\"]",
        "allowed-uids = [-1]",
        "allowed-uids = [4294967295]",
        "metrics-address = 9812",
    ] {
        let error = read(text).unwrap_err();
        let (key, value) = text.split_once(" = ").unwrap();
        let start = format!("config.toml, line 1: invalid value {value} for {key}: expected ");
        assert!(error.starts_with(&start), "{error}");
    }
    for text in
        ["attach.x = 1", "[attach]\nx = 1", "[[attach]]", "attach = { x = 1 }", "attach = [\n1]", "x.y = 1\n[attach]"]
    {
        let error = read(text).unwrap_err();
        assert!(error.contains(" for attach: expected \"bind\""), "{text}: {error}");
    }
    assert!(read("repository =").unwrap_err().contains("line 1: not TOML"));
    assert!(read("repository = \"a\"\nrepository = \"b\"").unwrap_err().contains("line 2: not TOML"));
}

#[test]
fn threads_of_all_pools_together_are_bounded() {
    for (workers, repositories, blocking_pools) in [(32, 1, 32), (256, 1, 256), (256, 12, 137), (256, 500, 3)] {
        let mut config = Config { workers: Some(workers), ..Config::default() };
        config.repositories = vec![config.repositories[0].clone(); repositories];
        assert_eq!(config.blocking_threads(), blocking_pools);
        assert!(workers + (repositories + 1) * blocking_pools <= MAX_POOL_THREADS);
    }
}
