//! `make demo`: a real image is pulled by a real containerd, the normal way and through
//! cvmfs-snapshotter, from a CernVM-FS repository that is mounted by a FUSE client; a container
//! computes something; the root file systems are compared.

mod picture;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use self::picture::Group;
use nix::sys::stat::SFlag;
use scene::containerd::{Containerd, Writable};
use scene::e2e_fixture::E2eFixture;
use scene::image::{Image, Layer};
use scene::process::{cache, run};
use scene::registry::Fetched;
use scene::sandbox::mounts_below;
use scene::snapshotter::Snapshotter;

/// Debian packages in a layer.
const PACKAGES: usize = 8;

const PROGRAM: &str = "
import numpy, sympy, networkx, babel.core, pygments.lexers, django.http, decimal, json, xml.dom.minidom
a = numpy.arange(250000.0).reshape(500, 500) / 250000
print('numpy', numpy.__version__, 'says: trace of a*a^T is', round(float(numpy.trace(a @ a.T)), 3))
";

fn main() -> ExitCode {
    let begun = Instant::now();
    let say = |text: &str| println!("[{:5.1} s] {text}", begun.elapsed().as_secs_f64());

    say("starting a registry, two containerd and a cvmfs-snapshotter, all with a place of their own");
    let stage = E2eFixture::start("demo", "");
    let image = build(&stage, &say);
    say("pushing the image to the registry on loopback");
    let reference = stage.registry.push(&image);
    say("publishing its layers in a CernVM-FS repository, as DUCC does");
    stage.repository.publish(&image);

    say("pulling through containerd's overlayfs: every layer is fetched and unpacked");
    let normal = measure(&stage, &stage.normal, &[], &image, &reference);
    say("pulling through cvmfs-snapshotter, all caches empty");
    stage.repository.mount_cold();
    let ours = measure(&stage, &stage.ours, &[&stage.snapshotter], &image, &reference);
    say(&format!("a container answered: {}", ours.answer.trim()));
    print_table([&normal, &ours]);
    if let Some(file) = std::env::var_os("DEMO_PICTURE") {
        fs::write(&file, draw([&normal, &ours], &image)).expect("the picture can be written");
        say(&format!("drew {}", file.display()));
    }

    say("comparing with the normal pull: type, mode, owner, mtime, links, xattrs, content");
    report_differences(&stage, &image, &image);
    say("comparing with a normal pull of what the publisher left of the image");
    let as_published = stage.repository.as_published(&stage.builder, &image);
    stage.normal.pull(&stage.registry.push(&as_published));
    let fine = report_differences(&stage, &as_published, &image) == 0 && normal.answer == ours.answer;
    drop(stage);
    say(if fine {
        "done; nothing is left running or mounted"
    } else {
        "FAILED: the root file systems are not the same"
    });
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Compares the root file systems of `expected`, pulled the normal way, and of `image` through us, as those
/// see them who only look and those who write; returns how many differences there are.
fn report_differences(stage: &E2eFixture, expected: &Image, image: &Image) -> usize {
    let mut all = 0;
    for (writable, name) in [(Writable::No, "read-only view"), (Writable::Yes, "container")] {
        let comparison = stage.compare(expected, image, writable);
        let mut by_property: BTreeMap<&str, usize> = BTreeMap::new();
        for difference in &comparison.differences {
            *by_property.entry(difference.property).or_default() += 1;
        }
        let counts: Vec<String> = by_property.iter().map(|(property, count)| format!("{property} {count}")).collect();
        let counts = if counts.is_empty() { String::new() } else { format!(" ({})", counts.join(", ")) };
        println!(
            "          {name}: {} entries, {} MB of content, {} differences{counts}",
            comparison.entries,
            comparison.bytes / 1_000_000,
            comparison.differences.len()
        );
        all += comparison.differences.len();
    }
    all
}

/// An image of Debian packages, under layers that do everything a layer can do.
fn build(stage: &E2eFixture, say: &impl Fn(&str)) -> Image {
    let mut packages: Vec<PathBuf> = fs::read_dir(cache().join("demo/debs"))
        .expect("make demo downloads the packages")
        .map(|entry| entry.expect("an entry can be read").path())
        .filter(|path| path.extension().is_some_and(|e| e == "deb"))
        .collect();
    packages.sort();
    let mut layers: Vec<Layer> = Vec::new();
    let lower = packages.len().div_ceil(PACKAGES);
    for (n, some) in packages.chunks(PACKAGES).enumerate() {
        say(&format!("making layer {} of {} from {} Debian packages", n + 1, lower + 6, some.len()));
        layers.push(stage.builder.layer(|l| {
            for package in some {
                let (from, to) = (package.display().to_string(), l.path("").display().to_string());
                run("dpkg-deb", ["--extract", &from, &to]).ok();
            }
        }));
    }
    say("making layers that delete, replace, link and repeat");
    layers.extend(upper_layers(stage));
    let library_path = "LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu/blas:/usr/lib/x86_64-linux-gnu/lapack";
    let image = stage.builder.image("demo:1", &layers, &["PATH=/usr/bin:/bin", library_path]);
    let size: u64 = image.layers.iter().map(|l| l.size).sum();
    say(&format!("the image has {} layers, {} MB compressed", image.layers.len(), size / 1_000_000));
    image
}

fn upper_layers(stage: &E2eFixture) -> Vec<Layer> {
    let b = &stage.builder;
    let twice = b.layer(|l| {
        l.file("opt/twice/file", "stands twice").delete("opt/between");
    });
    let between = b.layer(|l| {
        l.file("opt/between", "deleted by the layer that stands twice").file("opt/twice/file", "hidden again");
    });
    let deleting = b.layer(|l| {
        l.delete("etc/debian_version").delete("usr/share/doc/perl").delete("usr/share/vim/vim90/tutor");
    });
    let replacing = b.layer(|l| {
        l.dir("usr/share/vim/vim90/colors").opaque("usr/share/vim/vim90/colors");
        l.file("usr/share/vim/vim90/colors/only.vim", "the rest of this directory is gone");
        l.file("usr/share/vim/vim90/lang", "a file where a directory was");
        l.dir("etc/issue").file("etc/issue/now", "a directory where a file was");
        l.delete("etc/host.conf").file("etc/host.conf", "deleted and made anew in one layer");
    });
    let special = b.layer(|l| {
        l.file("opt/special/setuid", "#!").mode("opt/special/setuid", 0o4755).owner("opt/special/setuid", 0, 50);
        l.file("opt/special/hard", "three names").hard_link("opt/special/hard", "opt/special/hard 2");
        l.hard_link("opt/special/hard", "opt/hard\n3").symlink("../nowhere", "opt/special/dangling");
        l.xattr("opt/special/hard", "user.note", b"seen").node("opt/special/fifo", SFlag::S_IFIFO, 0);
        l.node("opt/special/null", SFlag::S_IFCHR, 0x103).dir("opt/special/sticky").mode("opt/special/sticky", 0o1777);
        l.file(format!("opt/special/{}", "n".repeat(255)), "the longest name");
    });
    vec![twice.clone(), between, twice, deleting, replacing, special]
}

struct Measured {
    pull_seconds: f64,
    fetched: Fetched,
    disk_bytes: u64,
    /// Directories that overlayfs stacks below a container.
    lower: usize,
    /// A start that imports many modules, the first time and again.
    start_seconds: [f64; 2],
    /// A walk over the whole root that looks at every entry, the first time and again.
    find_seconds: [f64; 2],
    mounts: usize,
    answer: String,
}

fn seconds(work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_secs_f64()
}

fn measure(
    stage: &E2eFixture,
    containerd: &Containerd,
    snapshotters: &[&Snapshotter],
    image: &Image,
    reference: &str,
) -> Measured {
    let before = stage.registry.fetched();
    let begun = Instant::now();
    containerd.pull(reference);
    let pull_seconds = begun.elapsed().as_secs_f64();
    let fetched = stage.registry.fetched().since(&before);
    let state: Vec<PathBuf> = snapshotters.iter().map(|s| s.root()).chain([containerd.root()]).collect();
    let disk_bytes = state.iter().map(|dir| disk_use(dir)).sum();
    let mut answer = String::new();
    let start_seconds = [1, 2].map(|n| {
        let id = format!("numpy-{n}");
        seconds(|| answer = containerd.run(reference, &id, &["/usr/bin/python3", "-c", PROGRAM]).ok())
    });
    let (lower, find_seconds) = {
        let (key, at) = ("find", stage.sandbox.path("mnt/find"));
        let mounted = containerd.mount_image(image, key, &at, Writable::Yes);
        let mounts = containerd.snapshots().mounts(key).expect("it is mounted");
        let lower = mounts[0].options.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap_or_default();
        let arguments = [mounted.path(), Path::new("-newermt"), Path::new("1970-01-02")];
        let times = [1, 2].map(|_| seconds(|| drop(run("find", arguments).ok())));
        drop(mounted);
        containerd.snapshots().remove(key).expect("a snapshot can be removed");
        (lower.split(':').count(), times)
    };
    containerd.start_container(reference, "idle", &["/bin/sleep", "1000"]);
    let mounts = mounts_below(stage.sandbox.dir())
        .iter()
        .filter(|m| state.iter().chain([&containerd.root().with_file_name("state")]).any(|dir| m.starts_with(dir)))
        .count();
    containerd.end_container("idle");
    assert!(fetched.bytes > 0 && !image.layers.is_empty(), "the registry has seen the pull");
    Measured { pull_seconds, fetched, disk_bytes, lower, start_seconds, find_seconds, mounts, answer }
}

fn disk_use(dir: &Path) -> u64 {
    let output = run("du", ["--summarize", "--block-size=1", "--one-file-system", &dir.display().to_string()]).ok();
    output.split('\t').next().and_then(|bytes| bytes.parse().ok()).expect("du prints a number")
}

fn draw(sides: [&Measured; 2], image: &Image) -> String {
    #[allow(clippy::cast_precision_loss)]
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let size: u64 = image.layers.iter().map(|layer| layer.size).sum();
    let title = format!("An image of {} layers, {:.0} MB: make demo", image.layers.len(), megabytes(size));
    let group = |name, unit, of: &dyn Fn(&Measured) -> f64| Group { name, unit, values: sides.map(of) };
    let groups = [
        group("pull", "s", &|m| m.pull_seconds),
        group("fetched from the registry", "MB", &|m| megabytes(m.fetched.bytes)),
        group("on disk after the pull", "MB", &|m| megabytes(m.disk_bytes)),
        group("first start of a program", "s", &|m| m.start_seconds[0]),
        group("the same again", "s", &|m| m.start_seconds[1]),
    ];
    picture::svg(&title, &groups)
}

fn print_table(sides: [&Measured; 2]) {
    #[allow(clippy::cast_precision_loss)]
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    println!("\n  {:36} {:>12} {:>18} {:>14}", "", "normal pull", "cvmfs-snapshotter", "normal / ours");
    let row = |name: &str, digits: usize, of: &dyn Fn(&Measured) -> f64| {
        let [normal, ours] = sides.map(of);
        println!("  {name:36} {normal:>12.digits$} {ours:>18.digits$} {:>14.1}", normal / ours);
    };
    row("pull, seconds", 2, &|m| m.pull_seconds);
    row("fetched from the registry, MB", 3, &|m| megabytes(m.fetched.bytes));
    row("on disk after the pull, MB", 3, &|m| megabytes(m.disk_bytes));
    row("start that imports much, first, s", 2, &|m| m.start_seconds[0]);
    row("start that imports much, again, s", 2, &|m| m.start_seconds[1]);
    row("find over the whole root, first, s", 2, &|m| m.find_seconds[0]);
    row("find over the whole root, again, s", 2, &|m| m.find_seconds[1]);
    let count = |name: &str, of: &dyn Fn(&Measured) -> usize| {
        let [normal, ours] = sides.map(of);
        println!("  {name:36} {normal:>12} {ours:>18}");
    };
    count("lower directories", &|m| m.lower);
    count("mounts while one container runs", &|m| m.mounts);
    println!();
}
