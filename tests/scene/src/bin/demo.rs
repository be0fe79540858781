//! `make demo`: a real image is pulled by a real containerd, the normal way and through
//! cvmfs-snapshotter; a container computes something; both root file systems are compared.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use nix::sys::stat::SFlag;
use scene::containerd::{Containerd, Writable};
use scene::image::{Image, Layer};
use scene::process::{cache, run};
use scene::registry::Fetched;
use scene::sandbox::mounts_below;
use scene::stage::Stage;

/// Debian packages in a layer.
const PACKAGES: usize = 8;

const PROGRAM: &str = "
import numpy
a = numpy.arange(250000.0).reshape(500, 500) / 250000
print('numpy', numpy.__version__, 'says: trace of a*a^T is', round(float(numpy.trace(a @ a.T)), 3))
";

fn main() -> ExitCode {
    let begun = Instant::now();
    let say = |text: &str| println!("[{:5.1} s] {text}", begun.elapsed().as_secs_f64());

    say("starting a registry, two containerd and cvmfs-snapshotter, all with a place of their own");
    let stage = Stage::set("demo", "");
    let image = build(&stage, &say);
    say("pushing the image to the registry on loopback");
    let reference = stage.registry.push(&image);
    say("unpacking its layers into a repository, as DUCC publishes them");
    stage.repository.publish(&image);

    say("pulling through containerd's overlayfs: every layer is fetched and unpacked");
    let normal = measure(&stage, &stage.normal, &image, &reference);
    say("pulling through cvmfs-snapshotter: only the manifest and the configuration are fetched");
    let ours = measure(&stage, &stage.ours, &image, &reference);
    say(&format!("a container answered: {}", ours.answer.trim()));
    print_table(&normal, &ours);

    say("comparing both root file systems: type, mode, owner, mtime, links, xattrs, content");
    let mut differences = 0;
    for (writable, name) in [(Writable::No, "read-only view"), (Writable::Yes, "container")] {
        let comparison = stage.compare(&image, writable);
        println!(
            "          {name}: {} entries, {} MB of content, {} differences",
            comparison.entries,
            comparison.bytes / 1_000_000,
            comparison.differences.len()
        );
        for difference in comparison.differences.iter().take(20) {
            println!("            {difference}");
        }
        differences += comparison.differences.len();
    }
    let fine = differences == 0 && normal.answer == ours.answer;
    drop(stage);
    say(if fine {
        "done; nothing is left running or mounted"
    } else {
        "FAILED: the root file systems are not the same"
    });
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// An image of Debian packages, under layers that do everything a layer can do.
fn build(stage: &Stage, say: &impl Fn(&str)) -> Image {
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

fn upper_layers(stage: &Stage) -> Vec<Layer> {
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
    start_seconds: f64,
    fetched: Fetched,
    disk_bytes: u64,
    mounts: usize,
    answer: String,
}

fn measure(stage: &Stage, containerd: &Containerd, image: &Image, reference: &str) -> Measured {
    let before = stage.registry.fetched();
    let begun = Instant::now();
    containerd.pull(reference);
    let pull_seconds = begun.elapsed().as_secs_f64();
    let fetched = stage.registry.fetched().since(&before);
    let state = [containerd.root(), stage.snapshotter.root()];
    // The state of our snapshotter counts on our side only.
    let sides = if containerd.snapshotter() == "overlayfs" { &state[..1] } else { &state[..] };
    let disk_bytes = sides.iter().map(|dir| disk_use(dir)).sum();
    let begun = Instant::now();
    let answer = containerd.run(reference, "numpy", &["/usr/bin/python3", "-c", PROGRAM]).ok();
    let start_seconds = begun.elapsed().as_secs_f64();
    containerd.start_container(reference, "idle", &["/bin/sleep", "1000"]);
    let mounts = mounts_below(stage.sandbox.dir())
        .iter()
        .filter(|m| sides.iter().chain([&containerd.root().with_file_name("state")]).any(|dir| m.starts_with(dir)))
        .count();
    containerd.end_container("idle");
    assert!(fetched.bytes > 0 && !image.layers.is_empty(), "the registry has seen the pull");
    Measured { pull_seconds, start_seconds, fetched, disk_bytes, mounts, answer }
}

fn disk_use(dir: &Path) -> u64 {
    let output = run("du", ["--summarize", "--block-size=1", "--one-file-system", &dir.display().to_string()]).ok();
    output.split('\t').next().and_then(|bytes| bytes.parse().ok()).expect("du prints a number")
}

fn print_table(normal: &Measured, ours: &Measured) {
    #[allow(clippy::cast_precision_loss)]
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    println!("\n  {:32} {:>12} {:>18} {:>8}", "", "normal pull", "cvmfs-snapshotter", "ratio");
    let row = |name: &str, normal: f64, ours: f64, digits: usize| {
        println!("  {name:32} {normal:>12.digits$} {ours:>18.digits$} {:>8.1}", normal / ours);
    };
    row("pull, seconds", normal.pull_seconds, ours.pull_seconds, 2);
    row("fetched from the registry, MB", megabytes(normal.fetched.bytes), megabytes(ours.fetched.bytes), 3);
    row("on disk after the pull, MB", megabytes(normal.disk_bytes), megabytes(ours.disk_bytes), 3);
    row("container that imports numpy, s", normal.start_seconds, ours.start_seconds, 2);
    println!("  {:32} {:>12} {:>18}\n", "mounts while one container runs", normal.mounts, ours.mounts);
}
