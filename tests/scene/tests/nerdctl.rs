//! nerdctl with images whose layers were not downloaded. docs/containerd.md and docs/troubleshooting.md say what works,
//! what does not, and what to do instead.

use std::fs;
use std::path::Path;

use scene::e2e_fixture::E2eFixture;
use scene::image::Image;
use scene::process::{Output, eventually};

fn pulled(stage: &E2eFixture, name: &str) -> (Image, String) {
    let image = stage.shell_image(name, name);
    let reference = stage.publish_and_push(&image);
    stage.ours.nerdctl(&["pull", &reference]).ok();
    assert_eq!(stage.registry.fetched().layers_of(&image), 0, "{name} is published");
    (image, reference)
}

/// Saves it, and pushes it under another name.
fn save_and_push(stage: &E2eFixture, reference: &str) -> [Output; 2] {
    let tagged = format!("{reference}-tagged");
    stage.ours.nerdctl(&["tag", reference, &tagged]).ok();
    let archive = stage.sandbox.path("image.tar").display().to_string();
    [&["save", "--output", &archive, reference][..], &["push", &tagged]].map(|words| stage.ours.nerdctl(words))
}

#[test]
fn root_nerdctl_can_tag_run_and_commit_images_not_downloaded() {
    let stage = E2eFixture::start("tag", "");
    let (image, reference) = pulled(&stage, "tag:1");
    let [tagged, committed] = ["tagged", "committed"].map(|name| format!("{reference}-{name}"));
    let cat = |image: &str, file: &str| stage.ours.nerdctl(&["run", "--net", "none", "--rm", image, "/bin/cat", file]);
    stage.ours.nerdctl(&["tag", &reference, &tagged]).ok();
    assert_eq!(cat(&tagged, "/data/text").ok(), "tag:1");
    let program = ["/bin/sh", "-c", "echo new >/data/new"];
    let run = ["run", "--net", "none", "--name", "c", &tagged].into_iter().chain(program);
    stage.ours.nerdctl(&run.collect::<Vec<_>>()).ok();
    stage.ours.nerdctl(&["commit", "c", &committed]).ok();
    assert_eq!(cat(&committed, "/data/new").ok(), "new\n");
    assert_eq!(stage.registry.fetched().layers_of(&image), 0);
}

#[test]
fn root_nerdctl_save_and_push_need_blobs_that_pull_without_unpacking_fetches() {
    let stage = E2eFixture::start("save", "");
    for (n, more) in
        [&["pull", "--unpack=false"][..], &["pull", "--all-platforms"], &["--snapshotter", "overlayfs", "pull"]]
            .into_iter()
            .enumerate()
    {
        let (image, reference) = pulled(&stage, &format!("save{n}:1"));
        for output in save_and_push(&stage, &reference) {
            let says_it = output.stderr.contains("content digest") && output.stderr.contains("not found");
            assert!(!output.status.success() && says_it, "{output:?}");
        }
        stage.ours.nerdctl(&[more, &[&reference]].concat()).ok();
        assert_eq!(stage.registry.fetched().layers_of(&image), image.layers.len(), "{more:?}");
        for output in save_and_push(&stage, &reference) {
            output.ok();
        }
        // Its containers still stand on the published layers.
        let run = ["run", "--net", "none", "--rm", &reference, "/bin/cat", "/data/top"];
        assert_eq!(stage.ours.nerdctl(&run).ok(), format!("save{n}:1"));
    }
}

/// Bytes of the files in a directory and below.
fn bytes(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).expect("a directory can be read").map(|entry| entry.expect("it can be read"));
    entries
        .map(|entry| {
            let status = entry.metadata().expect("an entry is there");
            if status.is_dir() { bytes(&entry.path()) } else { status.len() }
        })
        .sum()
}

/// containerd compares what the container has with what the image has, and where both times have no fraction of a
/// second, it compares contents. No time in CernVM-FS has one.
#[test]
fn root_nerdctl_commit_reads_every_file_of_the_image() {
    const FILES: usize = 400;
    const SIZE: usize = 16 << 10;
    let stage = E2eFixture::start("commit", "");
    let noise = fs::File::open("/dev/urandom").expect("there is noise");
    let noise = |n: usize| {
        let mut content = vec![0; SIZE];
        std::os::unix::fs::FileExt::read_exact_at(&noise, &mut content, n as u64).expect("noise can be read");
        content
    };
    let layer = stage.builder.layer(|l| {
        for n in 0..FILES {
            l.file(format!("data/{n}"), noise(n));
        }
        // The real publisher stores whole seconds.
        l.whole_seconds();
    });
    let image = stage.builder.image("commit:1", &[stage.base_layer(), layer], &[]);
    let reference = stage.publish_and_push(&image);
    stage.ours.nerdctl(&["pull", &reference]).ok();
    stage.repository.mount_cold();
    let program = ["/bin/sh", "-c", "echo new >/new; sleep 1000"];
    let run = ["run", "--net", "none", "--detach", "--name", "c", &reference].into_iter().chain(program);
    stage.ours.nerdctl(&run.collect::<Vec<_>>()).ok();
    eventually("the container has what it needs to run", || {
        stage.ours.nerdctl(&["exec", "c", "/bin/cat", "/new"]).stdout == "new\n"
    });
    let cache = stage.repository.dir().with_extension("cache");
    let before = bytes(&cache);
    stage.ours.nerdctl(&["commit", "c", &format!("{reference}-committed")]).ok();
    let fetched = bytes(&cache) - before;
    let all = (FILES * SIZE) as u64;
    println!("a commit of 4 bytes fetched {fetched} of {all} bytes");
    assert!(fetched >= all, "a commit of 4 bytes fetched {fetched} of {all} bytes: docs/containerd.md says more");
    stage.ours.nerdctl(&["rm", "--force", "c"]).ok();
}
