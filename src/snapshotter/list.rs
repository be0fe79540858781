//! List, in pages: each is one short read, and between them nothing is open.
//!
//! The walk goes by ids, which no snapshot ever changes and none has twice: what is there from the
//! first page to the last is found exactly once, even if a commit gives it another name
//! meanwhile. Ids above the highest at the beginning are left out, so that it ends.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::{Result, Snapshotter};
use crate::model::{Snapshot, SnapshotId};
use crate::store::ReadTxn;

/// What is looked at in one page, unless one snapshot alone is more.
pub const MAX_PAGE_BYTES: usize = 1 << 20;
/// Snapshots that are looked at in one page.
const MAX_PAGE: usize = 1_000;
/// And how long it goes on: a worker has others to serve, and filters may be slow.
const MAX_PAGE_TIME: Duration = Duration::from_millis(20);

/// What was found at once.
#[derive(Debug)]
pub struct Page {
    pub found: Vec<Snapshot>,
    /// What those take in memory.
    pub bytes: usize,
    /// None: there is no more.
    pub rest: Option<Cursor>,
}

/// Snapshots that a List has not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    pub next: SnapshotId,
    pub last: SnapshotId,
}

impl Snapshotter {
    /// The first snapshots that `matches`, in no order. `hint` is a (ref, parent) that all of
    /// them have, if the caller knows one: then, mostly, only those are looked at.
    pub fn list(&self, hint: Option<(&str, &str)>, matches: impl Fn(&Snapshot) -> bool) -> Result<Page> {
        self.begin_list(hint, MAX_PAGE, &matches)
    }

    /// What follows of a List with the same `matches`.
    pub fn next_page(&self, rest: Cursor, matches: impl Fn(&Snapshot) -> bool) -> Result<Page> {
        self.continue_list(rest, MAX_PAGE, &matches)
    }

    pub(super) fn begin_list(
        &self,
        hint: Option<(&str, &str)>,
        most: usize,
        matches: &dyn Fn(&Snapshot) -> bool,
    ) -> Result<Page> {
        self.store.read(|tx| {
            if let Some((reference, parent)) = hint {
                let mut taking = PageBuilder::new(matches);
                let mut left = most;
                let all = tx.visit_by_ref(reference, parent, |snapshot| {
                    left = left.saturating_sub(1);
                    taking.push(snapshot) && left > 0
                })?;
                // More than one page of them: their keys may change, only ids can be walked.
                if all {
                    return Ok(taking.page(None));
                }
            }
            let Some(last) = tx.last_id()? else { return Ok(PageBuilder::new(matches).page(None)) };
            walk(tx, Cursor { next: SnapshotId(0), last }, most, matches)
        })
    }

    pub(super) fn continue_list(&self, rest: Cursor, most: usize, matches: &dyn Fn(&Snapshot) -> bool) -> Result<Page> {
        self.store.read(|tx| walk(tx, rest, most, matches))
    }
}

fn walk(tx: &ReadTxn, Cursor { next, last }: Cursor, most: usize, matches: &dyn Fn(&Snapshot) -> bool) -> Result<Page> {
    let mut taking = PageBuilder::new(matches);
    let next = tx.visit_range(next..=last, most, |snapshot| taking.push(snapshot))?;
    Ok(taking.page(next.map(|next| Cursor { next, last })))
}

/// A page that is being read.
struct PageBuilder<'m> {
    matches: &'m dyn Fn(&Snapshot) -> bool,
    until: Instant,
    looked_at: usize,
    found: Vec<Snapshot>,
    bytes: usize,
}

impl<'m> PageBuilder<'m> {
    fn new(matches: &'m dyn Fn(&Snapshot) -> bool) -> Self {
        Self { matches, until: Instant::now() + MAX_PAGE_TIME, looked_at: 0, found: Vec::new(), bytes: 0 }
    }

    /// False: it is for the next page. The first one is always taken, so that each gets on.
    fn push(&mut self, snapshot: Snapshot) -> bool {
        let bytes = snapshot.approximate_size();
        if self.looked_at > 0 && (self.looked_at + bytes > MAX_PAGE_BYTES || Instant::now() >= self.until) {
            return false;
        }
        self.looked_at += bytes;
        if (self.matches)(&snapshot) {
            self.bytes += bytes;
            self.found.push(snapshot);
        }
        true
    }

    fn page(self, rest: Option<Cursor>) -> Page {
        Page { found: self.found, bytes: self.bytes, rest }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::attach::AttachMode;
    use crate::model::{Key, Kind, LABEL_SNAPSHOT_REF, Labels, Timestamp};
    use crate::repository::Repository;
    use crate::snapshotter::{CreateRequest, SnapshotterOptions};
    use crate::store::Store;
    use crate::system::Host;

    struct Node {
        s: Snapshotter,
        _dir: tempfile::TempDir,
    }

    impl Node {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(&dir.path().join("metadata.sqlite"), None).unwrap();
            let repository =
                Repository::new("r".into(), dir.path().join("cvmfs"), Duration::from_secs(1), Arc::new(Host));
            let ways = SnapshotterOptions { attach: AttachMode::Symlink, overlay_options: Vec::new() };
            let s = Snapshotter::new(store, vec![repository], Arc::new(Host), dir.path(), ways);
            Self { s, _dir: dir }
        }

        fn prepare(&self, name: &str) {
            self.s.prepare(CreateRequest { key: key(name), parent: None, labels: Labels::new() }).unwrap();
        }

        /// So many committed snapshots at once.
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

        /// All that a List finds, page by page, with `meanwhile` between two of them.
        fn list(&self, most: usize, mut meanwhile: impl FnMut(&[Snapshot])) -> Vec<Snapshot> {
            let mut page = self.s.begin_list(None, most, &|_| true).unwrap();
            let mut all = page.found;
            while let Some(rest) = page.rest {
                meanwhile(&all);
                page = self.s.continue_list(rest, most, &|_| true).unwrap();
                assert!(page.found.len() <= most);
                all.append(&mut page.found);
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

    /// A walk by names would meet what is committed once more, or not at all.
    #[test]
    fn what_is_there_throughout_is_listed_once_whatever_happens_meanwhile() {
        const COUNT: usize = 24;
        for most in [1, 2, 3, 5, 8, 13] {
            let node = Node::new();
            (0..COUNT).for_each(|n| node.prepare(&format!("key-{n:02}")));
            // What each is called now; none: removed.
            let mut names: Vec<Option<String>> = (0..COUNT).map(|n| Some(format!("key-{n:02}"))).collect();
            let ids: Vec<SnapshotId> = names.iter().flatten().map(|name| node.s.stat(&key(name)).unwrap().id).collect();
            let mut step = 0;
            let all = node.list(most, |_| {
                step += 1;
                // Behind the walk and before it, to the front of all names and to their end.
                for (n, to) in [(step, "a"), (COUNT - step, "z"), (step * 5, "z"), (step * 7, "a")] {
                    if let Some(name) = &mut names[n % COUNT]
                        && name.starts_with("key")
                    {
                        let committed = format!("{to}-{name}");
                        node.s.commit(&key(&committed), &key(name), Labels::new(), None).unwrap();
                        *name = committed;
                    }
                }
                for n in [step * 11, COUNT - step / 2].into_iter().filter(|_| step % 3 == 1) {
                    if let Some(name) = names[n % COUNT].take() {
                        node.s.remove(&key(&name)).unwrap();
                    }
                }
                node.prepare(&format!("b-new-{step}"));
                node.prepare(&format!("y-new-{step}"));
            });
            assert!(step > 0 && step >= COUNT / most / 2, "{step} pages of {most}");
            let committed = names.iter().flatten().filter(|name| !name.starts_with("key")).count();
            assert!(committed > 0 && names.iter().any(Option::is_none), "{most}: {names:?}");
            let times = times_listed(&all);
            for (id, name) in ids.iter().zip(&names) {
                let listed = times.get(id).copied().unwrap_or(0);
                assert!(listed == 1 || name.is_none() && listed == 0, "{most}: {name:?} is listed {listed} times");
            }
            assert!(times.keys().all(|id| ids.contains(id)), "{most}: what is new is left for the next List");
        }
    }

    #[test]
    fn a_list_ends_though_more_is_added_than_it_reads() {
        let node = Node::new();
        node.insert(40, &Labels::new());
        let mut pages = 1;
        let all = node.list(4, |_| {
            pages += 1;
            assert!(pages <= 40, "it goes on and on");
            node.insert(8, &Labels::new());
        });
        assert_eq!(all.len(), 40);
        assert!(pages >= 10, "{pages} pages");
    }

    #[test]
    fn a_chunk_is_bounded_in_number_and_bytes_and_gets_on_all_the_same() {
        let node = Node::new();
        node.insert(2 * MAX_PAGE + 1, &Labels::new());
        let of = |bytes: usize| Labels::from([("l".to_owned(), "x".repeat(bytes))]);
        node.insert(10, &of(300_000));
        // More than a page each.
        node.insert(3, &of((1 << 20) - 1));
        let mut page = node.s.list(None, |_| true).unwrap();
        let (mut listed, mut alone) = (0, 0);
        loop {
            assert!(!page.found.is_empty() && page.found.len() <= MAX_PAGE);
            assert_eq!(page.bytes, page.found.iter().map(Snapshot::approximate_size).sum::<usize>());
            listed += page.found.len();
            if page.bytes > MAX_PAGE_BYTES {
                assert_eq!(page.found.len(), 1);
                alone += 1;
            }
            let Some(rest) = page.rest else { break };
            page = node.s.next_page(rest, |_| true).unwrap();
        }
        assert_eq!((listed, alone), (2 * MAX_PAGE + 1 + 10 + 3, 3));
    }

    #[test]
    fn a_chunk_in_which_nothing_matches_goes_on() {
        let node = Node::new();
        node.insert(MAX_PAGE + 10, &Labels::new());
        node.prepare("wanted");
        let matches = |snapshot: &Snapshot| snapshot.kind == Kind::Active;
        let mut page = node.s.list(None, matches).unwrap();
        assert!(page.found.is_empty());
        while let Some(rest) = page.rest {
            page = node.s.next_page(rest, matches).unwrap();
        }
        assert_eq!(page.found[0].key, key("wanted"));
        let none = Node::new().s.list(None, |_| true).unwrap();
        assert!(none.found.is_empty() && none.rest.is_none());
    }

    /// Slow filters must not hold a worker for a whole page.
    #[test]
    fn a_chunk_ends_when_its_time_is_over() {
        let node = Node::new();
        node.insert(3, &Labels::new());
        let slow = |_: &Snapshot| {
            std::thread::sleep(MAX_PAGE_TIME);
            true
        };
        let mut page = node.s.list(None, slow).unwrap();
        let mut pages = 1;
        while let Some(rest) = page.rest {
            assert_eq!(page.found.len(), 1);
            page = node.s.next_page(rest, slow).unwrap();
            pages += 1;
        }
        assert_eq!(pages, 3);
    }

    /// The question after a remote layer is asked with each pull.
    #[test]
    fn only_those_with_the_reference_are_looked_at_unless_there_are_very_many() {
        let node = Node::new();
        let of = |reference: &str| Labels::from([(LABEL_SNAPSHOT_REF.to_owned(), reference.to_owned())]);
        node.insert(500, &of("other"));
        node.insert(3, &of("few"));
        node.insert(MAX_PAGE + 5, &of("many"));
        for (reference, expected) in [("few", 3), ("many", MAX_PAGE + 5), ("none", 0)] {
            let looked_at = Cell::new(0);
            let matches = |snapshot: &Snapshot| {
                looked_at.set(looked_at.get() + 1);
                snapshot.labels[LABEL_SNAPSHOT_REF] == reference
            };
            let mut page = node.s.list(Some((reference, "")), matches).unwrap();
            let mut all = page.found;
            while let Some(rest) = page.rest {
                page = node.s.next_page(rest, matches).unwrap();
                all.append(&mut page.found);
            }
            assert_eq!(all.len(), expected, "{reference}");
            assert!(times_listed(&all).values().all(|times| *times == 1), "{reference}");
            assert!(reference == "many" || looked_at.get() == expected, "{reference}: {}", looked_at.get());
        }
    }
}
