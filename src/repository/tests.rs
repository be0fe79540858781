use std::sync::atomic::Ordering;

use super::*;
use crate::system::Host;
use std::fs;

fn digest(digit: char) -> Digest {
    Digest::parse(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap()
}

fn path_of(repository: &Repository, digit: char) -> Result<PathBuf, Unavailable> {
    repository.layer(&digest(digit)).map(|layer| layer.path().to_owned())
}

#[test]
fn absent_means_not_published_only_where_a_repository_is() {
    let dir = tempfile::tempdir().unwrap();
    let timeout = Duration::from_secs(10);
    let repository = Repository::new("r".into(), dir.path().join("cvmfs"), timeout, Arc::new(Host));
    let layer = |digit| path_of(&repository, digit);
    let nowhere = Unavailable::NotMounted { repository: dir.path().join("cvmfs") };
    assert_eq!(layer('a'), Err(nowhere.clone()));
    fs::create_dir(dir.path().join("cvmfs")).unwrap();
    assert_eq!(layer('a'), Err(nowhere));
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
fn manifests_are_read_where_a_repository_is_and_links_are_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let cvmfs = dir.path().join("cvmfs");
    fs::create_dir(&cvmfs).unwrap();
    let repository = Repository::new("r".into(), cvmfs.clone(), Duration::from_secs(10), Arc::new(Host));
    let image = ImageRef::parse("a.org/x:1").unwrap();
    // It was taken for "there is none", and kept.
    assert_eq!(repository.manifest(&image), Err(Unavailable::NotMounted { repository: cvmfs.clone() }));
    fs::create_dir(cvmfs.join(".layers")).unwrap();
    assert_eq!(repository.manifest(&image), Ok(None));
    // It was taken for a repository that cannot be read, and asked for with each container.
    let long = format!("a.org/{}:{}", "x".repeat(200), "t".repeat(100));
    assert_eq!(repository.manifest(&ImageRef::parse(&long).unwrap()), Ok(None));
    let good = format!(r#"{{"Config":{{"Digest":"{}"}},"Layers":[]}}"#, digest('a'));
    let at = cvmfs.join(".metadata/a.org/x:1/manifest.json");
    fs::create_dir_all(at.parent().unwrap()).unwrap();
    fs::write(dir.path().join("elsewhere"), &good).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &at).unwrap();
    assert_eq!(repository.manifest(&image), Ok(None));
    fs::remove_file(&at).unwrap();
    fs::create_dir(&at).unwrap();
    assert_eq!(repository.manifest(&image), Ok(None));
    fs::remove_dir(&at).unwrap();
    nix::unistd::mkfifo(&at, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(repository.manifest(&image), Ok(None));
    fs::remove_file(&at).unwrap();
    fs::write(&at, vec![b' '; usize::try_from(manifest::MAX_BYTES).unwrap() + 1]).unwrap();
    assert_eq!(repository.manifest(&image), Ok(None));
    fs::write(&at, good).unwrap();
    assert_eq!(repository.manifest(&image).unwrap().map(|found| found.config), Some(digest('a')));
}

/// It was mounted between the two questions, and the answer was "not published".
#[test]
fn a_repository_that_is_mounted_in_the_middle_of_a_question_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let (cvmfs, away) = (dir.path().join("cvmfs"), dir.path().join("away"));
    let path = format!(".layers/aa/{}/layerfs", "a".repeat(64));
    fs::create_dir_all(away.join(&path)).unwrap();
    let (from, to) = (away, cvmfs.clone());
    let sys = crate::system::testing::FaultySys::before_call(move |_, asked| {
        if asked == to.join(LAYERS) {
            let _ = fs::rename(&from, &to);
        }
    });
    let repository = Repository::new("r".into(), cvmfs.clone(), Duration::from_secs(10), Arc::new(sys));
    assert_eq!(path_of(&repository, 'a'), Ok(cvmfs.join(path)));
}

/// `lstat` goes on answering from the kernel's caches.
#[test]
fn a_server_is_asked_once_for_one_call_and_anew_for_the_next() {
    let dir = tempfile::tempdir().unwrap();
    for digit in ['a', 'b'] {
        let hex = digit.to_string().repeat(64);
        fs::create_dir_all(dir.path().join(format!(".layers/{}/{hex}/layerfs", &hex[..2]))).unwrap();
    }
    let asked = Arc::new(std::sync::atomic::AtomicUsize::default());
    let counted = Arc::clone(&asked);
    let sys = crate::system::testing::FaultySys::before_call(move |call, _| {
        counted.fetch_add(usize::from(call == "statfs"), Ordering::SeqCst);
    });
    let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(sys));
    for call in 1..4 {
        let since = Instant::now();
        for digit in ['a', 'b', 'a'] {
            repository.layer_since(&digest(digit), since).unwrap();
            assert_eq!(asked.load(Ordering::SeqCst), call);
        }
    }
    repository.layer(&digest('a')).unwrap();
    repository.layer(&digest('a')).unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 5);
}

/// It was told as any other failure of a call, by nobody but the call that met it.
#[test]
fn an_input_output_error_is_the_servers_where_a_client_names_one_and_others_are_asked_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for digit in ['a', 'b'] {
        fs::create_dir_all(dir.path().join(layer_path(&digest(digit)))).unwrap();
    }
    for names_server in [false, true] {
        if names_server {
            xattr::set(dir.path(), "user.host", b"http://s1.example.org").unwrap();
        }
        let sys = crate::system::testing::FaultySys::refusing(dir.path().join(layer_path(&digest('a'))), Errno::EIO);
        let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(sys));
        let repository = Arc::new(repository);
        assert!(Repository::is_healthy_cached(&repository));
        let missing = path_of(&repository, 'a').unwrap_err();
        assert_eq!(matches!(missing, Unavailable::ServerUnreachable(_)), names_server, "{missing}");
        assert_eq!(repository.refusal_of_pulls().is_some(), names_server);
        assert_eq!(Repository::is_healthy_cached(&repository), !names_server);
        path_of(&repository, 'b').unwrap();
    }
}

#[test]
fn a_new_repository_without_layers_is_mounted() {
    let dir = tempfile::tempdir().unwrap();
    xattr::set(dir.path(), FQRN_XATTR, b"a.test").unwrap();
    let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(Host));
    assert_eq!(path_of(&repository, 'a'), Err(Unavailable::NotPublished));
}

/// The setting can be changed while the repository stays mounted. What a layer itself has is not asked: an image may have
/// such an attribute.
#[test]
fn layers_are_refused_as_long_as_the_client_lists_attributes_below_its_root() {
    let dir = tempfile::tempdir().unwrap();
    let layer = dir.path().join(layer_path(&digest('a')));
    fs::create_dir_all(&layer).unwrap();
    xattr::set(&layer, FQRN_XATTR, b"of the image").unwrap();
    let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(Host));
    for _ in 0..2 {
        xattr::set(dir.path().join(LAYERS), FQRN_XATTR, b"a.test").unwrap();
        let since = Instant::now();
        for _ in 0..2 {
            let refused = repository.layer_since(&digest('a'), since).map(drop);
            assert_eq!(refused, Err(Unavailable::OwnAttributes));
        }
        assert_eq!(repository.check_layers_directory(), Err(Unavailable::OwnAttributes));
        xattr::remove(dir.path().join(LAYERS), FQRN_XATTR).unwrap();
        repository.layer_since(&digest('a'), since).unwrap();
        assert_eq!(repository.check_layers_directory(), Ok(()));
    }
}

/// Attributes of a directory on a disk were taken for those of a client, and were missing in masks.
#[test]
fn only_a_client_has_attributes_that_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let names = || {
        let repository = Repository::new("r".into(), dir.path().into(), Duration::from_secs(10), Arc::new(Host));
        repository.client_attributes().unwrap().len()
    };
    xattr::set(dir.path(), "user.mine", b"1").unwrap();
    assert_eq!(names(), 0);
    xattr::set(dir.path(), FQRN_XATTR, b"a.test").unwrap();
    assert_eq!(names(), 2);
}
