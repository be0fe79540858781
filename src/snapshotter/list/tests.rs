use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::model::AttachMode;
use crate::model::{Key, Kind, LABEL_SNAPSHOT_REF, Labels, Timestamp};
use crate::repository::Repository;
use crate::snapshotter::{CreateRequest, SnapshotterOptions};
use crate::store::Store;
use crate::system::Host;

struct Fixture {
    s: Snapshotter,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("metadata.sqlite"), None).unwrap();
        let repository = Repository::new("r".into(), dir.path().join("cvmfs"), Duration::from_secs(1), Arc::new(Host));
        let options = SnapshotterOptions { attach: AttachMode::Symlink, overlay_options: Vec::new() };
        let s = Snapshotter::new(store, vec![repository], Arc::new(Host), dir.path(), options);
        Self { s, _dir: dir }
    }

    fn prepare(&self, name: &str) {
        self.s.prepare(CreateRequest { key: key(name), parent: None, labels: Labels::new() }).unwrap();
    }

    /// Inserts committed snapshots.
    fn insert(&self, count: usize, labels: &Labels) {
        let ids: Vec<SnapshotId> = (0..count).map(|_| self.s.store.reserve_id().unwrap()).collect();
        let snapshot = |id: SnapshotId| Snapshot {
            id,
            key: key(&format!("inserted-{id}")),
            parent: None,
            kind: Kind::Committed,
            created: Timestamp(0),
            updated: Timestamp(0),
            labels: labels.clone(),
            layer: None,
            usage: None,
        };
        self.s.store.write(|tx| ids.iter().try_for_each(|id| tx.insert(&snapshot(*id)))).unwrap();
    }

    /// All snapshots of a List, with a call of `meanwhile` between two pages.
    fn list(&self, page_size: usize, mut meanwhile: impl FnMut(&[Snapshot])) -> Vec<Snapshot> {
        let mut page = self.s.first_page(None, page_size, &|_| true).unwrap();
        let mut all = page.snapshots;
        while let Some(cursor) = page.cursor {
            meanwhile(&all);
            page = self.s.page_at(cursor, page_size, &|_| true).unwrap();
            assert!(page.snapshots.len() <= page_size);
            all.append(&mut page.snapshots);
        }
        all
    }
}

fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

fn times_listed(all: &[Snapshot]) -> BTreeMap<SnapshotId, usize> {
    let mut times = BTreeMap::new();
    for snapshot in all {
        *times.entry(snapshot.id).or_default() += 1;
    }
    times
}

/// A walk by names would find a snapshot that is committed meanwhile twice, or not at all.
#[test]
fn snapshots_that_exist_throughout_a_list_are_listed_once() {
    const COUNT: usize = 24;
    for page_size in [1, 2, 3, 5, 8, 13] {
        let fixture = Fixture::new();
        (0..COUNT).for_each(|n| fixture.prepare(&format!("key-{n:02}")));
        // The current name of each snapshot, or None if it was removed.
        let mut names: Vec<Option<String>> = (0..COUNT).map(|n| Some(format!("key-{n:02}"))).collect();
        let ids: Vec<SnapshotId> = names.iter().flatten().map(|name| fixture.s.stat(&key(name)).unwrap().id).collect();
        let mut step = 0;
        let all = fixture.list(page_size, |_| {
            step += 1;
            // Commits behind the walk and ahead of it, with names at both ends of the order.
            for (n, to) in [(step, "a"), (COUNT - step, "z"), (step * 5, "z"), (step * 7, "a")] {
                if let Some(name) = &mut names[n % COUNT]
                    && name.starts_with("key")
                {
                    let committed = format!("{to}-{name}");
                    fixture.s.commit(&key(&committed), &key(name), Labels::new(), None).unwrap();
                    *name = committed;
                }
            }
            for n in [step * 11, COUNT - step / 2].into_iter().filter(|_| step % 3 == 1) {
                if let Some(name) = names[n % COUNT].take() {
                    fixture.s.remove(&key(&name)).unwrap();
                }
            }
            fixture.prepare(&format!("b-new-{step}"));
            fixture.prepare(&format!("y-new-{step}"));
        });
        assert!(step > 0 && step >= COUNT / page_size / 2, "{step} pages of {page_size}");
        let committed = names.iter().flatten().filter(|name| !name.starts_with("key")).count();
        assert!(committed > 0 && names.iter().any(Option::is_none), "{page_size}: {names:?}");
        let times = times_listed(&all);
        for (id, name) in ids.iter().zip(&names) {
            let listed = times.get(id).copied().unwrap_or(0);
            assert!(listed == 1 || name.is_none() && listed == 0, "{page_size}: {name:?} is listed {listed} times");
        }
        assert!(times.keys().all(|id| ids.contains(id)), "{page_size}: a new snapshot is listed");
    }
}

#[test]
fn list_ends_although_more_is_added_than_it_reads() {
    let fixture = Fixture::new();
    fixture.insert(40, &Labels::new());
    let mut pages = 1;
    let all = fixture.list(4, |_| {
        pages += 1;
        assert!(pages <= 40, "the list does not end");
        fixture.insert(8, &Labels::new());
    });
    assert_eq!(all.len(), 40);
    assert!(pages >= 10, "{pages} pages");
}

#[test]
fn page_is_bounded_in_number_and_bytes_and_never_empty() {
    let fixture = Fixture::new();
    fixture.insert(2 * MAX_PAGE + 1, &Labels::new());
    let labels_of = |bytes: usize| Labels::from([("l".to_owned(), "x".repeat(bytes))]);
    fixture.insert(10, &labels_of(300_000));
    // Each of these takes more than a page.
    fixture.insert(3, &labels_of((1 << 20) - 1));
    let mut page = fixture.s.list(None, |_| true).unwrap();
    let (mut listed, mut single) = (0, 0);
    loop {
        assert!(!page.snapshots.is_empty() && page.snapshots.len() <= MAX_PAGE);
        assert_eq!(page.bytes, page.snapshots.iter().map(Snapshot::approximate_size).sum::<usize>());
        listed += page.snapshots.len();
        if page.bytes > MAX_PAGE_BYTES {
            assert_eq!(page.snapshots.len(), 1);
            single += 1;
        }
        let Some(cursor) = page.cursor else { break };
        page = fixture.s.next_page(cursor, |_| true).unwrap();
    }
    assert_eq!((listed, single), (2 * MAX_PAGE + 1 + 10 + 3, 3));
}

#[test]
fn page_without_matches_leads_to_the_next_page() {
    let fixture = Fixture::new();
    fixture.insert(MAX_PAGE + 10, &Labels::new());
    fixture.prepare("active");
    let matches = |snapshot: &Snapshot| snapshot.kind == Kind::Active;
    let mut page = fixture.s.list(None, matches).unwrap();
    assert!(page.snapshots.is_empty());
    while let Some(cursor) = page.cursor {
        page = fixture.s.next_page(cursor, matches).unwrap();
    }
    assert_eq!(page.snapshots[0].key, key("active"));
    let none = Fixture::new().s.list(None, |_| true).unwrap();
    assert!(none.snapshots.is_empty() && none.cursor.is_none());
}

/// Slow filters must not occupy a worker for a whole page.
#[test]
fn page_ends_when_its_time_is_over() {
    let fixture = Fixture::new();
    fixture.insert(3, &Labels::new());
    let slow = |_: &Snapshot| {
        std::thread::sleep(MAX_PAGE_TIME);
        true
    };
    let mut page = fixture.s.list(None, slow).unwrap();
    let mut pages = 1;
    while let Some(cursor) = page.cursor {
        assert_eq!(page.snapshots.len(), 1);
        page = fixture.s.next_page(cursor, slow).unwrap();
        pages += 1;
    }
    assert_eq!(pages, 3);
}

/// containerd lists the snapshots with a reference at each pull.
#[test]
fn list_with_a_hint_reads_only_snapshots_that_have_it_unless_there_are_many() {
    let fixture = Fixture::new();
    let labels_of = |reference: &str| Labels::from([(LABEL_SNAPSHOT_REF.to_owned(), reference.to_owned())]);
    fixture.insert(500, &labels_of("other"));
    fixture.insert(3, &labels_of("few"));
    fixture.insert(MAX_PAGE + 5, &labels_of("many"));
    for (reference, expected) in [("few", 3), ("many", MAX_PAGE + 5), ("none", 0)] {
        let read_count = Cell::new(0);
        let matches = |snapshot: &Snapshot| {
            read_count.set(read_count.get() + 1);
            snapshot.labels[LABEL_SNAPSHOT_REF] == reference
        };
        let mut page = fixture.s.list(Some((reference, "")), matches).unwrap();
        let mut all = page.snapshots;
        while let Some(cursor) = page.cursor {
            page = fixture.s.next_page(cursor, matches).unwrap();
            all.append(&mut page.snapshots);
        }
        assert_eq!(all.len(), expected, "{reference}");
        assert!(times_listed(&all).values().all(|times| *times == 1), "{reference}");
        assert!(reference == "many" || read_count.get() == expected, "{reference}: {}", read_count.get());
    }
}
