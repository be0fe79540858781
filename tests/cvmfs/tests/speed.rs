//! How long the demo's amount of files takes. Not part of a normal run: 365 MB are written.

#![forbid(unsafe_code)]

mod fixture;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use fixture::{RepositoryFixture, noise, write};

fn walk(dir: &Path, read: bool) -> usize {
    let mut count = 0;
    for entry in fs::read_dir(dir).expect("a directory can be listed") {
        let entry = entry.expect("a listing comes to its end");
        let found = entry.path().symlink_metadata().expect("what is listed is there");
        count += 1;
        if found.is_dir() {
            count += walk(&entry.path(), read);
        } else if read && found.is_file() {
            fs::read(entry.path()).expect("a file can be read");
        }
    }
    count
}

#[test]
#[ignore = "writes 365 MB"]
fn root_20_000_files_are_published_in_15_s_and_walked_in_5_s() {
    let mut stage = RepositoryFixture::new();
    for layer in 0..10 {
        write(&stage.source().join(format!("layer{layer}/.cvmfscatalog")), "");
        for file in 0..2000_u64 {
            // Half of it noise, half of it nothing: compresses like programs do.
            let mut content = noise(layer * 2000 + file, 9_000);
            content.resize(18_250, 0);
            write(&stage.source().join(format!("layer{layer}/dir{}/file{file}", file % 50)), content);
        }
    }
    let timed = |what: &str, limit, work: &mut dyn FnMut()| {
        let begin = Instant::now();
        work();
        let time = begin.elapsed();
        println!("{what}: {time:?}");
        assert!(time < Duration::from_secs(limit), "{what} took {time:?}");
    };
    timed("first publish", 15, &mut || assert_eq!(stage.publish(), 1));
    write(&stage.source().join("layer3/dir3/more"), "one file more");
    timed("second publish", 5, &mut || assert_eq!(stage.publish(), 2));
    for mut options in [vec![], vec!["--backend", "crate"]] {
        if !cfg!(feature = "cvmfs-crate") && !options.is_empty() {
            continue;
        }
        options.extend(["--name-length", "0"]);
        println!("{options:?}");
        let mount = stage.mount("mount", &options);
        let root = mount.mountpoint().to_owned();
        timed("cold walk", 5, &mut || assert!(walk(&root, false) > 20_000));
        timed("warm walk", 5, &mut || assert!(walk(&root, false) > 20_000));
        timed("cold read of everything", 120, &mut || assert!(walk(&root, true) > 20_000));
        timed("four walks at once, warm", 10, &mut || {
            thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| walk(&root, false)))));
        });
    }
}
