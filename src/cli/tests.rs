use super::*;

fn parse(line: &str) -> Result<Arguments, String> {
    super::parse(line.split(' ').map(OsString::from)).map_err(|e| e.to_string())
}

#[test]
fn flags_have_one_dash_or_two() {
    let expected = parse("x --address /a --config /c --log-level debug --root /r").unwrap();
    assert_eq!(expected.log_level, Some(LevelFilter::Debug));
    assert_eq!(expected.address, PathBuf::from("/a"));
    for line in
        ["x -address /a -config /c -log-level debug -root /r", "x -address=/a --config=/c -log-level=debug --root=/r"]
    {
        assert_eq!(parse(line).as_ref(), Ok(&expected), "{line}");
    }
}

#[test]
fn default_paths_are_those_of_the_go_snapshotter() {
    let arguments = parse("x").unwrap();
    assert_eq!(arguments.address, PathBuf::from("/run/containerd-cvmfs-grpc/containerd-cvmfs-grpc.sock"));
    assert_eq!(arguments.root, PathBuf::from("/var/lib/containerd-cvmfs-grpc"));
    assert_eq!((arguments.config, arguments.log_level, arguments.action), (None, None, Action::Serve));
}

/// `--check-config doctor` ran the doctor, and its exit code was taken for the result of the check.
#[test]
fn two_actions_at_once_are_refused() {
    for flag in ["--check-config", "-check-config", "--rebuild-metadata", "--rebuild-metadata --json"] {
        for command in ["status", "doctor", "gc --json", "probe {}"] {
            let error = parse(&format!("x {flag} {command}")).unwrap_err();
            let (flag, command) = (flag.trim_start_matches('-'), command.split(' ').next().unwrap());
            let flag = flag.split(' ').next().unwrap();
            let message = format!("'--{flag}' cannot be used with the command '{command}': give one of the two");
            assert!(error.contains(&message), "{error}");
        }
    }
    assert!(parse("x doctor --check-config").unwrap_err().contains("--check-config"));
    assert!(parse("x --check-config --rebuild-metadata").unwrap_err().contains("--rebuild-metadata"));
    let (before, after) = ("x --address /a --config /c --root /r", "--address /a --config /c --root /r");
    for command in ["status", "doctor", "gc"] {
        let expected = parse(&format!("{before} {command}")).unwrap();
        assert_eq!(parse(&format!("x {command} {after}")), Ok(expected.clone()));
        assert_eq!(expected.config, Some(PathBuf::from("/c")));
    }
    assert_eq!(parse(&format!("{before} --check-config")).unwrap().action, Action::CheckConfig);
    assert_eq!(parse("x probe {}").unwrap().action, Action::Probe("{}".to_owned()));
}

#[test]
fn wrong_flag_is_named_in_the_error() {
    assert!(parse("x --adress /a").unwrap_err().contains("--adress"));
    assert!(parse("x --log-level loud").unwrap_err().contains("trace, debug"));
    assert!(parse("x stray").unwrap_err().contains("stray"));
    assert!(parse("x --json").unwrap_err().contains("--rebuild-metadata"));
}
