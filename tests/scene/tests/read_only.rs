//! Promise 7, the repository is only read: strace records every system call of the daemon over its whole life, and each
//! call that names a path of the repository is checked.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use scene::e2e_fixture::E2eFixture;
use scene::process::eventually;

/// Calls that change nothing that they name. Any other call counts as a change.
const READING_CALLS: &str = "access close dup dup2 dup3 epoll_ctl epoll_wait execve faccessat faccessat2 fadvise64 fcntl \
    fgetxattr flistxattr flock fstat fstatfs getcwd getdents64 getxattr lgetxattr listxattr llistxattr lseek lstat mmap \
    newfstatat poll pread64 read readlink readlinkat stat statfs statx";
/// Calls whose strings are content, not paths.
const CONTENT_CALLS: &str = "write writev pwrite64 sendmsg sendto recvmsg recvfrom";
/// Calls whose first string is only written down somewhere, or mounted elsewhere.
const ATTACHING_CALLS: &str = "symlink symlinkat mount";
/// Calls that change what a link leads to.
const LINK_FOLLOWING_CALLS: &str = "chmod fchmodat chown fchownat setxattr removexattr truncate utimensat";

#[test]
fn root_daemon_opens_nothing_in_repository_for_writing() {
    for attach in ["bind", "symlink"] {
        let mut stage = E2eFixture::start("read-only", &format!("attach = \"{attach}\""));
        stage.snapshotter.end(Signal::SIGTERM);
        let mut text = String::new();
        let mut life = |stage: &mut E2eFixture, n: usize, how: Signal, act: &dyn Fn(&E2eFixture)| {
            let trace = stage.sandbox.path(&format!("trace-{n}"));
            let record = format!("--output={}", trace.display());
            // With -D strace is a child of the daemon, so that our signals reach the daemon.
            let strace =
                ["strace", "-D", "--follow-forks", "--decode-fds=all", "--trace=%file,%desc", "--quiet=attach"];
            stage.snapshotter.start_again_below(&[&strace[..], &[&record]].concat());
            let containerd = stage.ours.snapshots();
            eventually("containerd has connected again", || containerd.prepare("probe", "", &[]).is_ok());
            act(stage);
            stage.snapshotter.end(how);
            eventually("the trace is complete", || {
                let text = fs::read_to_string(&trace).unwrap_or_default();
                text.lines().last().is_some_and(|line| line.contains("+++ "))
            });
            text += &fs::read_to_string(&trace).expect("there is a trace");
        };
        // Layers with a marker, and one that is not published.
        let image = stage.shell_image("layers:1", "x");
        let reference = stage.publish_and_push(&image);
        let local = stage.registry.push(&stage.shell_image("local:1", "z"));
        let all = [&reference, &local];
        life(&mut stage, 1, Signal::SIGKILL, &|stage| {
            for reference in all {
                stage.ours.pull(reference);
                stage.ours.run(reference, "c", &["/bin/sh", "-c", "cat /data/text; rm /data/top"]).ok();
            }
            stage.ours.start_container(&reference, "stays", &["/bin/sleep", "1000"]);
        });
        life(&mut stage, 2, Signal::SIGTERM, &|stage| {
            stage.ours.run(&reference, "again", &["/bin/true"]).ok();
            stage.ours.end_container("stays");
            for reference in all {
                stage.ours.remove(reference);
            }
            eventually("everything is removed", || {
                stage.ours.collect_garbage();
                stage.snapshot_dirs().is_empty()
            });
        });
        let trace = Trace::parse(&text, stage.repository.dir());
        scene::report::print(format_args!(
            "{attach}: {} calls traced, {} opened the repository for reading, none for writing",
            text.lines().count(),
            trace.reads
        ));
        assert_eq!(trace.changes, Vec::<String>::new(), "{attach}");
        // An empty trace would prove nothing.
        assert!(trace.reads > 10, "{attach}: it does not even show what is read: {}", trace.reads);
        assert!(trace.places.len() >= 3, "{attach}: it does not show what is attached: {:?}", trace.places);
    }
}

/// The calls of a trace that concern the repository.
struct Trace {
    repository: PathBuf,
    /// The paths at which parts of it were attached at any time, and at which they are attached now.
    places: BTreeSet<PathBuf>,
    attached: BTreeSet<PathBuf>,
    /// How many times a path was opened for reading only.
    reads: usize,
    /// The calls that change, or open for a change.
    changes: Vec<String>,
}

impl Trace {
    fn parse(text: &str, repository: &Path) -> Self {
        let mut trace = Self {
            repository: repository.to_owned(),
            places: BTreeSet::new(),
            attached: BTreeSet::new(),
            reads: 0,
            changes: Vec::new(),
        };
        for (call, arguments) in text.lines().filter_map(call) {
            trace.check_call(call, arguments);
        }
        trace
    }

    /// Whether `path` is of the repository, by its own name or through a place.
    fn holds(&self, path: &Path) -> bool {
        path.starts_with(&self.repository) || path.ancestors().skip(1).any(|above| self.places.contains(above))
    }

    fn check_call(&mut self, call: &str, arguments: &str) {
        let is = |calls: &str| calls.split_whitespace().any(|name| name == call);
        let strings = parts(arguments, '"', '"');
        let mut paths = parts(arguments, '<', '>');
        if is(ATTACHING_CALLS) {
            if let [from, to, ..] = &strings[..]
                && (self.holds(from) || self.attached.contains(from))
            {
                self.places.insert(to.clone());
                self.attached.insert(to.clone());
            }
            paths.extend(strings.into_iter().skip(1));
        } else if !is(CONTENT_CALLS) {
            if let ("rename", [from, to, ..]) = (call, &strings[..])
                && self.attached.contains(from)
            {
                self.places.insert(to.clone());
                self.attached.insert(to.clone());
            } else if is("umount2 unlink unlinkat") {
                self.attached.retain(|place| !strings.contains(place));
            }
            paths.extend(strings);
        }
        let held = paths.iter().any(|path| self.holds(path));
        let through = is(LINK_FOLLOWING_CALLS)
            && !arguments.contains("NOFOLLOW")
            && paths.iter().any(|p| self.attached.contains(p));
        if is("open openat openat2") && held {
            let more = ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND", "O_TMPFILE"];
            if arguments.contains("O_RDONLY") && !more.iter().any(|flag| arguments.contains(flag)) {
                self.reads += 1;
                return;
            }
        }
        if through || held && !is(READING_CALLS) {
            self.changes.push(format!("{call}({arguments}"));
        }
    }
}

/// The name of the call that a line shows the beginning of, and what follows.
fn call(line: &str) -> Option<(&str, &str)> {
    // The rest of one that another thread interrupted names nothing new.
    let line = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
    let (name, arguments) = line.split_once('(')?;
    name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_').then_some((name, arguments))
}

/// The strings between two delimiters, without the paths of descriptors that are not files.
fn parts(arguments: &str, open: char, close: char) -> Vec<PathBuf> {
    let mut parts = Vec::new();
    let mut rest = arguments;
    while let Some((_, tail)) = rest.split_once(open) {
        let Some((part, tail)) = tail.split_once(close) else { break };
        parts.push(PathBuf::from(part));
        rest = tail;
    }
    parts
}

#[test]
fn trace_check_detects_each_call_that_changes_the_repository() {
    let repository = Path::new("/r");
    let attached =
        "1 symlink(\"/r/layer\", \"/s/7/fs\") = 0\n1 mount(\"/r/layer\", \"/s/8/fs\", NULL, MS_BIND, NULL) = 0\n";
    for line in [
        "12 openat(AT_FDCWD</>, \"/r/x\", O_WRONLY|O_CREAT|O_CLOEXEC, 0666) = -1 EROFS (Read-only file system)",
        "12 openat(AT_FDCWD</>, \"/s/7/fs/x\", O_RDWR <unfinished ...>",
        "12 openat(5</r/layer>, \"x\", O_RDONLY|O_CREAT, 0600) = 6</r/layer/x>",
        "12 mkdir(\"/r/x\", 0777) = 0",
        "12 unlinkat(5</r/layer>, \"x\", 0 <unfinished ...>",
        "12 rename(\"/s/a\", \"/s/8/fs/b\") = 0",
        "12 rename(\"/r/a\", \"/s/b\") = 0",
        "12 symlink(\"/s/x\", \"/r/x\") = 0",
        "12 mount(\"/s/x\", \"/r/x\", NULL, MS_BIND, NULL) = 0",
        "12 umount2(\"/r\", UMOUNT_NOFOLLOW) = 0",
        "12 setxattr(\"/r/x\", \"user.x\", \"y\", 1, 0) = 0",
        "12 chmod(\"/s/8/fs\", 0700) = 0",
        "1 rename(\"/s/8/fs\", \"/s/8/to\") = 0\n12 mkdir(\"/s/8/to/x\", 0700) = 0",
        "12 utimensat(AT_FDCWD</>, \"/s/7/fs\", [], 0) = 0",
        "12 write(9</r/x>, \"text\", 4) = 4",
        "12 fchmod(9</r/x>, 0600) = 0",
        "12 creat(\"/r/x\", 0600) = 3",
    ] {
        let trace = Trace::parse(&format!("{attached}{line}\n"), repository);
        assert_eq!(trace.changes.len(), 1, "{line}");
    }
    for line in [
        "12 openat(AT_FDCWD</>, \"/r/x\", O_RDONLY|O_CLOEXEC) = 5</r/x>",
        "12 <... openat resumed>) = 5</r/x>",
        "12 write(2<pipe:[77]>, \"cannot open \\\"/r/x\\\"\", 9) = 9",
        "12 mkdir(\"/rest/x\", 0777) = 0",
        "12 mkdir(\"/s/9/fs\", 0777) = 0",
        "12 unlink(\"/s/7/fs\") = 0",
        "12 umount2(\"/s/8/fs\", UMOUNT_NOFOLLOW) = 0",
        "12 statfs(\"/r/layer\", {}) = 0",
    ] {
        let trace = Trace::parse(&format!("{attached}{line}\n"), repository);
        assert_eq!(trace.changes, Vec::<String>::new(), "{line}");
        assert_eq!(trace.reads, usize::from(line.contains("O_RDONLY")), "{line}");
    }
}
