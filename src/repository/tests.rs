use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;

use super::manifest::ImageRef;
use super::*;
use crate::system::Host;
use crate::system::testing::FaultySys;

fn digest(digit: char) -> Digest {
    Digest::parse(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap()
}

fn layer_dir(repository: &Repository, digit: char) -> Result<PathBuf, Unavailable> {
    repository.generation().layer(&digest(digit)).map(|layer| layer.path().to_owned())
}

#[test]
fn absent_layer_is_not_published_only_where_a_repository_is_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let timeout = Duration::from_secs(10);
    let repository = Repository::new("r".into(), dir.path().join("cvmfs"), timeout, Arc::new(Host));
    let layer = |digit| layer_dir(&repository, digit);
    let not_mounted = Unavailable::NotMounted { repository: dir.path().join("cvmfs") };
    assert_eq!(layer('a'), Err(not_mounted.clone()));
    fs::create_dir(dir.path().join("cvmfs")).unwrap();
    assert_eq!(layer('a'), Err(not_mounted));
    fs::create_dir(dir.path().join("cvmfs/.layers")).unwrap();
    assert_eq!(layer('a'), Err(Unavailable::NotPublished));
    let top = dir.path().join(format!("cvmfs/.layers/aa/{}/layerfs", "a".repeat(64)));
    fs::create_dir_all(&top).unwrap();
    assert_eq!(layer('a'), Ok(top));
    let file = dir.path().join(format!("cvmfs/.layers/bb/{}/layerfs", "b".repeat(64)));
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "").unwrap();
    assert_eq!(layer('b'), Err(Unavailable::NotADirectory { path: file }));
    let link = dir.path().join(format!("cvmfs/.layers/cc/{}/layerfs", "c".repeat(64)));
    fs::create_dir_all(link.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/etc", &link).unwrap();
    assert_eq!(layer('c'), Err(Unavailable::LeadsOut { path: link }));
}

#[test]
fn manifests_are_read_only_where_a_repository_is_mounted_and_never_through_links() {
    let dir = tempfile::tempdir().unwrap();
    let cvmfs = dir.path().join("cvmfs");
    fs::create_dir(&cvmfs).unwrap();
    let repository = Repository::new("r".into(), cvmfs.clone(), Duration::from_secs(10), Arc::new(Host));
    let image = ImageRef::parse("a.org/x:1").unwrap();
    // This was taken for an image without a manifest, and remembered.
    assert_eq!(repository.generation().manifest(&image), Err(Unavailable::NotMounted { repository: cvmfs.clone() }));
    fs::create_dir(cvmfs.join(".layers")).unwrap();
    assert_eq!(repository.generation().manifest(&image), Ok(None));
    // This was taken for a repository that cannot be read.
    let long = format!("a.org/{}:{}", "x".repeat(200), "t".repeat(100));
    assert_eq!(repository.generation().manifest(&ImageRef::parse(&long).unwrap()), Ok(None));
    let good = format!(r#"{{"Config":{{"Digest":"{}"}},"Layers":[]}}"#, digest('a'));
    let file = cvmfs.join(".metadata/a.org/x:1/manifest.json");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(dir.path().join("elsewhere"), &good).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &file).unwrap();
    assert_eq!(repository.generation().manifest(&image), Ok(None));
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert_eq!(repository.generation().manifest(&image), Ok(None));
    fs::remove_dir(&file).unwrap();
    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(repository.generation().manifest(&image), Ok(None));
    fs::remove_file(&file).unwrap();
    fs::write(&file, vec![b' '; usize::try_from(manifest::MAX_BYTES).unwrap() + 1]).unwrap();
    assert_eq!(repository.generation().manifest(&image), Ok(None));
    fs::write(&file, good).unwrap();
    assert_eq!(repository.generation().manifest(&image).unwrap().map(|manifest| manifest.config), Some(digest('a')));
}

/// The repository was mounted between the two system calls, and the layer was reported as not published.
#[test]
fn layer_is_looked_up_again_if_the_repository_was_mounted_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let (cvmfs, elsewhere) = (dir.path().join("cvmfs"), dir.path().join("elsewhere"));
    let path = format!(".layers/aa/{}/layerfs", "a".repeat(64));
    fs::create_dir_all(elsewhere.join(&path)).unwrap();
    let (from, to) = (elsewhere, cvmfs.clone());
    let sys = FaultySys::before_call(move |_, path| {
        if path == to.join(LAYERS) {
            let _ = fs::rename(&from, &to);
        }
    });
    let repository = Repository::new("r".into(), cvmfs.clone(), Duration::from_secs(10), Arc::new(sys));
    assert_eq!(layer_dir(&repository, 'a'), Ok(cvmfs.join(path)));
}

/// `lstat` goes on answering from the kernel's caches.
#[test]
fn mount_is_checked_once_for_each_call() {
    let dir = tempfile::tempdir().unwrap();
    for digit in ['a', 'b'] {
        let hex = digit.to_string().repeat(64);
        fs::create_dir_all(dir.path().join(format!(".layers/{}/{hex}/layerfs", &hex[..2]))).unwrap();
    }
    let checks = Arc::new(AtomicUsize::default());
    let counter = Arc::clone(&checks);
    let sys = FaultySys::before_call(move |call, _| {
        counter.fetch_add(usize::from(call == "statfs"), Ordering::SeqCst);
    });
    let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(sys));
    for call in 1..4 {
        let since = Instant::now();
        for digit in ['a', 'b', 'a'] {
            repository.generation().layer_since(&digest(digit), since).unwrap();
            assert_eq!(checks.load(Ordering::SeqCst), call);
        }
    }
    repository.generation().layer(&digest('a')).unwrap();
    repository.generation().layer(&digest('a')).unwrap();
    assert_eq!(checks.load(Ordering::SeqCst), 5);
}

/// The error was reported like any other, and only by the call that met it.
#[test]
fn io_error_is_a_server_outage_only_if_a_client_names_its_server_and_other_layers_are_still_tried() {
    let dir = tempfile::tempdir().unwrap();
    for digit in ['a', 'b'] {
        fs::create_dir_all(dir.path().join(layer_path(&digest(digit)))).unwrap();
    }
    for names_server in [false, true] {
        if names_server {
            xattr::set(dir.path(), "user.host", b"http://s1.example.org").unwrap();
        }
        let sys = FaultySys::refusing(dir.path().join(layer_path(&digest('a'))), Errno::EIO);
        let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(sys));
        assert!(repository.is_healthy_cached());
        let missing = layer_dir(&repository, 'a').unwrap_err();
        assert_eq!(matches!(missing, Unavailable::ServerUnreachable(_)), names_server, "{missing}");
        assert_eq!(repository.refusal_of_pulls().is_some(), names_server);
        assert_eq!(repository.is_healthy_cached(), !names_server);
        layer_dir(&repository, 'b').unwrap();
    }
}

#[test]
fn repository_without_layers_counts_as_mounted() {
    let dir = tempfile::tempdir().unwrap();
    xattr::set(dir.path(), FQRN_XATTR, b"a.test").unwrap();
    let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(Host));
    assert_eq!(layer_dir(&repository, 'a'), Err(Unavailable::NotPublished));
}

/// The setting can be changed while the repository stays mounted. A layer's own attributes do not count, because an image
/// may have the same one.
#[test]
fn layers_are_refused_while_the_client_lists_attributes_below_its_root() {
    let dir = tempfile::tempdir().unwrap();
    let layer = dir.path().join(layer_path(&digest('a')));
    fs::create_dir_all(&layer).unwrap();
    xattr::set(&layer, FQRN_XATTR, b"of the image").unwrap();
    let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(Host));
    for _ in 0..2 {
        xattr::set(dir.path().join(LAYERS), FQRN_XATTR, b"a.test").unwrap();
        let since = Instant::now();
        for _ in 0..2 {
            let refused = repository.generation().layer_since(&digest('a'), since).map(drop);
            assert_eq!(refused, Err(Unavailable::OwnAttributes));
        }
        assert_eq!(repository.generation().check_layers_directory(), Err(Unavailable::OwnAttributes));
        xattr::remove(dir.path().join(LAYERS), FQRN_XATTR).unwrap();
        repository.generation().layer_since(&digest('a'), since).unwrap();
        assert_eq!(repository.generation().check_layers_directory(), Ok(()));
    }
}

/// Attributes of a plain directory were taken for those of a client, and were missing in masks.
#[test]
fn only_attributes_of_a_client_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let names = || {
        let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(Host));
        repository.generation().client_attributes().unwrap().len()
    };
    xattr::set(dir.path(), "user.mine", b"1").unwrap();
    assert_eq!(names(), 0);
    xattr::set(dir.path(), FQRN_XATTR, b"a.test").unwrap();
    assert_eq!(names(), 2);
}
