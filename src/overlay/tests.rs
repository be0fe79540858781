use super::*;

fn remote(id: u64, digit: char, mask: MaskContents, needs_hide: bool) -> ChainEntry {
    let digest = Digest::parse(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap();
    ChainEntry::Remote { id: SnapshotId(id), variant: SourceVariant(0), digest, mask, needs_hide }
}

fn local(id: u64) -> ChainEntry {
    ChainEntry::Local(SnapshotId(id))
}

const PLAIN: MaskContents = MaskContents { top_catalogs: 0, others: false };
const TOP: MaskContents = MaskContents { top_catalogs: 1, others: false };
const AUTO: MaskContents = MaskContents { top_catalogs: 3, others: false };
const FULL: MaskContents = MaskContents { top_catalogs: 1, others: true };
const MARKERS: MaskContents = MaskContents { top_catalogs: 0, others: true };

fn paths() -> SnapshotPaths {
    SnapshotPaths::new("/s".into())
}

fn lower(chain: &[ChainEntry]) -> String {
    LowerDirectories::of_chain(&paths(), chain).joined.replace("/s/", "")
}

#[test]
fn lower_directories_follow_the_kinds_and_masks_of_the_chain() {
    for (chain, expected) in [
        (vec![local(2), local(1)], "2/fs:1/fs"),
        (vec![remote(2, 'b', PLAIN, false), remote(1, 'a', PLAIN, false)], "2/fs:1/fs"),
        (vec![remote(2, 'b', TOP, false), remote(1, 'a', TOP, false)], "2/m:2/fs:1/fs"),
        (vec![remote(2, 'b', TOP, false), local(1)], "2/m:2/fs:1/fs"),
        (vec![remote(3, 'c', TOP, true), remote(2, 'b', FULL, true)], "3/m:3/fs:3/h:2/m:2/fs:2/h"),
        (vec![remote(2, 'b', TOP, false), remote(1, 'a', AUTO, false)], "2/m:2/fs:1/m:1/fs"),
        (vec![remote(2, 'b', AUTO, false), remote(1, 'a', TOP, false)], "2/m:2/fs:1/fs"),
        (vec![remote(2, 'b', MARKERS, false), remote(1, 'a', TOP, false)], "2/m:2/fs:1/m:1/fs"),
        (vec![remote(2, 'b', FULL, false), remote(1, 'a', TOP, false)], "2/m:2/fs:1/fs"),
        (vec![remote(3, 'c', TOP, false), local(2), remote(1, 'a', TOP, false)], "3/m:3/fs:2/fs:1/m:1/fs"),
        (
            vec![remote(4, 'a', TOP, false), remote(3, 'b', TOP, false), remote(2, 'a', TOP, false), local(1)],
            "4/m:4/fs:3/fs:1/fs",
        ),
    ] {
        assert_eq!(lower(&chain), expected);
    }
}

fn text(mounts: &[Mount]) -> String {
    let [mount] = mounts else { panic!("one mount describes a snapshot") };
    format!("{} {} {}", mount.kind.as_str(), mount.source, mount.options.join(","))
}

#[test]
fn mounts_depend_on_the_kind_and_the_number_of_lower_directories() {
    let (paths, id) = (paths(), SnapshotId(9));
    let options = ["index=off".to_owned()];
    let none = LowerDirectories::of_chain(&paths, &[]);
    let one = LowerDirectories::of_chain(&paths, &[local(1)]);
    let two = LowerDirectories::of_chain(&paths, &[local(2), local(1)]);
    for (mounts, expected) in [
        (active(&paths, id, &none, &options), "bind /s/9/fs rw,rbind"),
        (view(&paths, id, &none, &options), "bind /s/9/fs ro,rbind"),
        (view(&paths, id, &one, &options), "bind /s/1/fs ro,rbind"),
        (view(&paths, id, &two, &options), "overlay overlay lowerdir=/s/2/fs:/s/1/fs,index=off"),
        (
            active(&paths, id, &one, &options),
            "overlay overlay workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/1/fs,index=off",
        ),
    ] {
        assert_eq!(text(&mounts), expected);
    }
}

#[test]
fn mount_options_of_the_longest_chain_fit_into_a_page() {
    let chain: Vec<ChainEntry> = (0..127)
        .map(|n| {
            let digest = Digest::parse(&format!("sha256:{n:064x}")).unwrap();
            ChainEntry::Remote {
                id: SnapshotId(999_000 + n),
                variant: SourceVariant(0),
                digest,
                mask: FULL,
                needs_hide: true,
            }
        })
        .collect();
    // containerd shortens the paths of lower directories: they are relative to the directory of all snapshots.
    let paths = SnapshotPaths::new("/var/lib/containerd-cvmfs-grpc/snapshotter/snapshots".into());
    let mounts =
        active(&paths, SnapshotId(999_999), &LowerDirectories::of_chain(&paths, &chain), &["index=off".to_owned()]);
    let shortened = text(&mounts)
        .replace("/var/lib/containerd-cvmfs-grpc/snapshotter/snapshots/999999", "UPPER")
        .replace("/var/lib/containerd-cvmfs-grpc/snapshotter/snapshots/", "")
        .replace("UPPER", "/var/lib/containerd-cvmfs-grpc/snapshotter/snapshots/999999");
    assert!(shortened.len() < 4000, "{}", shortened.len());
}

#[test]
fn uppermost_directory_of_a_view_is_always_local() {
    let view =
        |chain: &[ChainEntry]| text(&view(&paths(), SnapshotId(9), &LowerDirectories::of_chain(&paths(), chain), &[]));
    let plain = [remote(2, 'b', PLAIN, false), remote(1, 'a', PLAIN, false)];
    assert_eq!(view(&plain), "overlay overlay lowerdir=/s/9/fs:/s/2/fs:/s/1/fs");
    assert_eq!(view(&plain[..1]), "overlay overlay lowerdir=/s/9/fs:/s/2/fs");
    assert_eq!(view(&[remote(2, 'b', PLAIN, false), local(1)]), "overlay overlay lowerdir=/s/9/fs:/s/2/fs:/s/1/fs");
    assert_eq!(view(&[remote(2, 'b', TOP, false)]), "overlay overlay lowerdir=/s/2/m:/s/2/fs");
    // Equal layers leave one directory.
    let equal = [remote(2, 'b', PLAIN, false), remote(1, 'b', PLAIN, false)];
    assert_eq!(view(&equal), "overlay overlay lowerdir=/s/9/fs:/s/2/fs");
}
