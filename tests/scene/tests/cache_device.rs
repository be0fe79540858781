//! The client's cache on the file system of the state root, where overlayfs and FUSE can wait for each other, and on
//! another.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;
use scene::doctor;
use scene::e2e_fixture::E2eFixture;
use scene::process::{eventually, run};
use scene::publisher::Repository;
use scene::release::read;

fn cache(stage: &E2eFixture) -> PathBuf {
    stage.repository.dir().with_extension("cache")
}

/// The log's line about the cache, after the daemon has examined the repository.
fn logged(stage: &E2eFixture) -> Option<String> {
    eventually("the start has looked at the repository", || stage.snapshotter.log().contains("repository_available"));
    let log = stage.snapshotter.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("client_cache_on_state_root")).collect();
    assert!(lines.len() < 2, "it is said once for each start: {lines:?}");
    lines.first().map(|&line| line.to_owned())
}

fn forget_log(stage: &E2eFixture) {
    fs::write(stage.sandbox.path("s/log"), "").expect("a log can be emptied");
}

/// The cache in the status, as JSON and as text.
fn cache_in_status(stage: &E2eFixture) -> (Option<String>, String) {
    let ask = |form: &[&str]| stage.snapshotter.admin(&[&["status"], form].concat()).ok();
    let json: serde_json::Value = serde_json::from_str(&ask(&["--json"])).expect("it is JSON");
    (json["repositories"][0]["cache_on_state_file_system"].as_str().map(str::to_owned), ask(&[]))
}

/// The state, text and remedy of a finding.
fn diagnosed(stage: &E2eFixture) -> (String, String, Option<String>) {
    let all = doctor::read(&stage.snapshotter.admin(&["doctor", "--json"]));
    let mut found = all.iter().filter(|one| one.check == "repository.cache-device");
    let one = found.next().unwrap_or_else(|| panic!("it is not in {all:#?}"));
    (one.state.clone(), one.what.clone(), one.remedy.clone())
}

#[test]
fn root_client_cache_on_file_system_of_state_root_causes_a_warning() {
    let mut stage = E2eFixture::start("one-device", "");
    let place = cache(&stage).display().to_string();
    let line = logged(&stage).expect("the start says it");
    for words in [place.as_str(), "\"warning\"", "scene.test", "CVMFS_CACHE_BASE in /etc/cvmfs/default.local", "--root"]
    {
        assert!(line.contains(words), "no {words} in {line}");
    }
    let (json, text) = cache_in_status(&stage);
    assert_eq!(json.as_deref(), Some(place.as_str()));
    assert!(text.contains(&format!("cache, {place}, is on the file system of the snapshots")), "{text}");
    let warns = |stage: &E2eFixture| {
        let (state, what, remedy) = diagnosed(stage);
        assert_eq!(state, "warning");
        assert!(what.contains(&place) && what.contains(&stage.snapshotter.root().display().to_string()), "{what}");
        assert!(remedy.is_some_and(|text| text.contains("CVMFS_CACHE_BASE=") && text.contains("--root")));
    };
    warns(&stage);
    stage.snapshotter.end(Signal::SIGTERM);
    warns(&stage);

    // The unit grants no CAP_SYS_PTRACE. Without it the daemon reads the client's configuration.
    let without = ["setpriv", "--bounding-set=-sys_ptrace"];
    forget_log(&stage);
    stage.snapshotter.start_again_below(&without);
    assert_eq!(logged(&stage), None, "nobody says where it is");
    stage.snapshotter.end(Signal::SIGTERM);
    configure_client(&stage, &format!("CVMFS_CACHE_DIR={place}\n"));
    forget_log(&stage);
    stage.snapshotter.start_again_below(&without);
    let line = logged(&stage).expect("the start says it");
    assert!(line.contains(&place), "{line}");
}

/// Writes the client's configuration below `/etc`, on an overlay that only this sandbox sees.
fn configure_client(stage: &E2eFixture, text: &str) {
    let [upper, work] = ["etc.upper", "etc.work"].map(|name| stage.sandbox.make_dir(name));
    let options = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
    mount(Some("etc"), "/etc", Some("overlay"), MsFlags::empty(), Some(options.as_str())).expect("/etc can be covered");
    fs::create_dir_all("/etc/cvmfs").expect("a directory can be made");
    fs::write("/etc/cvmfs/default.local", text).expect("a file can be written");
}

#[test]
fn root_client_cache_on_other_file_system_causes_no_warning() {
    let stage = E2eFixture::start_with_repository("two-devices", "", Repository::mounted_with_own_cache_disk);
    assert_eq!(logged(&stage), None);
    let (json, text) = cache_in_status(&stage);
    assert_eq!(json, None);
    assert!(!text.contains("file system of the snapshots"), "{text}");
    let (state, what, _) = diagnosed(&stage);
    assert_eq!(state, "good", "{what}");
    assert!(what.contains(&cache(&stage).display().to_string()), "{what}");
}

/// The doctor's check of the cache does not wait for a repository that hangs either.
#[test]
fn root_cache_check_does_not_wait_for_hung_repository() {
    let stage = E2eFixture::start("hung-device", "repository-timeout = 2");
    stage.repository.command("hang all");
    let all = doctor::read(&stage.snapshotter.admin(&["doctor", "--json"]));
    stage.repository.command("normal");
    assert!(all.iter().any(|one| one.check == "repository.answers" && one.state == "problem"), "{all:#?}");
    assert!(all.iter().all(|one| one.check != "repository.cache-device"), "{all:#?}");
    assert!(Path::new(&cache(&stage)).exists());
}

/// docs/repository.md says how to free a node that hangs: by telling the kernel to abort the FUSE connection.
#[test]
fn root_aborting_fuse_connection_frees_hung_programs() {
    let stage = E2eFixture::start("abort", "repository-timeout = 2");
    let line = read("docs/repository.md");
    let command = line.split('`').find(|text| text.starts_with("echo 1 >")).expect("the page has the command");
    stage.repository.command("hang all");
    let mut hung =
        Command::new("ls").arg(stage.repository.dir().join("nobody-has-looked-there")).spawn().expect("ls runs");
    // The number of the connection is the minor number of the device in the mount table.
    let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("the mount table can be read");
    let point = stage.repository.dir().display().to_string();
    let mut lines = table.lines().filter(|line| line.split(' ').nth(4) == Some(point.as_str()));
    let device = lines.next().and_then(|line| line.split(' ').nth(2)).expect("the repository is mounted");
    let number = device.strip_prefix("0:").expect("FUSE has no disk");
    let mounted = mount(Some("fusectl"), "/sys/fs/fuse/connections", Some("fusectl"), MsFlags::empty(), None::<&str>);
    assert!(matches!(mounted, Ok(()) | Err(Errno::EBUSY)), "{mounted:?}");
    assert!(hung.try_wait().expect("it is our child").is_none(), "it hangs");
    run("sh", ["-c", &command.replace("NUMBER", number)]).ok();
    eventually("what hung goes on", || hung.try_wait().expect("it is our child").is_some());
}
