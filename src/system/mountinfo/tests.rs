use super::*;

#[test]
fn mount_points_are_read_with_their_escapes() {
    let table = b"22 1 254:0 / / rw - ext4 /dev/vda rw\n\
        30 22 0:5 / /mnt/two\\040words\\134 rw shared:1 - tmpfs tmpfs rw\n\
        31 22 0:300 /sub /cvmfs/a ro,nosuid - fuse cvmfs2 ro\nbroken\n";
    let expected = [("/", 254, 0, false), ("/mnt/two words\\", 0, 5, false), ("/cvmfs/a", 0, 300, true)];
    let expected = expected.map(|(point, major, minor, is_fuse)| MountInfo {
        point: point.into(),
        device: makedev(major, minor),
        is_fuse,
        is_autofs: false,
    });
    assert_eq!(mounts(table).collect::<Vec<_>>(), expected);
}

/// A repository below a mount point or behind a link was taken for one that is not mounted.
#[test]
fn path_is_on_the_mount_that_it_leads_to_and_no_link_is_read_on_fuse() {
    let mount = |point: &str, device, kind: &str| MountInfo {
        point: point.into(),
        device,
        is_fuse: kind == "fuse",
        is_autofs: kind == "autofs",
    };
    let mounts = [
        mount("/", 1, "ext4"),
        mount("/mnt/m", 2, "fuse"),
        mount("/cvmfs", 3, "autofs"),
        mount("/cvmfs/a", 4, "fuse"),
        mount("/mnt/m", 5, "fuse"),
        mount("/mnt/m/own", 6, "ext4"),
    ];
    let links = [("/link", "/mnt/m/compat"), ("/home/up", "../link/x"), ("/loop", "loop"), ("/file", "/etc")];
    let read_link = |link: &Path| {
        assert!(["/mnt/m", "/cvmfs"].iter().all(|mount| !link.starts_with(mount)), "{} is read", link.display());
        let target = links.iter().find(|(name, _)| Path::new(name) == link).map(|(_, target)| target.into());
        target.ok_or_else(|| io::Error::from_raw_os_error(Errno::EINVAL as i32))
    };
    for (path, device) in [
        ("/mnt/m", Some(5)),
        ("/mnt/m/compat", Some(5)),
        ("/mnt/m/compat/../x", Some(5)),
        ("/mnt/m/own/x", None),
        ("/mnt", None),
        ("/link", Some(5)),
        ("/link/deeper", Some(5)),
        ("/home/up", Some(5)),
        ("/cvmfs/a", Some(4)),
        ("/cvmfs/not-mounted", None),
        ("/file/x", None),
    ] {
        let resolved = resolve(Path::new(path), &mounts, &read_link).unwrap();
        let actual = containing_mount(&resolved, &mounts).filter(|mount| mount.is_fuse).map(|mount| mount.device);
        assert_eq!(actual, device, "{path} leads to {}", resolved.display());
    }
    assert_eq!(resolve(Path::new("/loop"), &mounts, &read_link).unwrap_err().errno, Errno::ELOOP);
}
