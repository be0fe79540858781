use super::*;
use crate::model::testing::local_snapshot;

fn candidate(id: u64, key: &str, parent: &str, kind: Kind) -> Candidate {
    let record = Snapshot { parent: Key::parse_optional(parent).unwrap(), ..local_snapshot(id, key, kind) };
    Candidate { name: key.to_owned(), record: Ok(record) }
}

/// The keys of the accepted records in their order, and the rejected ones with their reasons.
fn validated(candidates: Vec<Candidate>) -> (Vec<String>, Vec<String>) {
    let Accepted { snapshots, rejected } = validate(candidates);
    let mut rejected: Vec<String> = rejected.iter().map(|one| format!("{}: {}", one.name, one.reason)).collect();
    rejected.sort();
    (snapshots.iter().map(|snapshot| snapshot.key.as_str().to_owned()).collect(), rejected)
}

#[test]
fn parents_come_before_their_children() {
    use Kind::{Active, Committed};
    let (order, rejected) = validated(vec![
        candidate(4, "top", "middle", Active),
        candidate(3, "middle", "bottom", Committed),
        candidate(2, "bottom", "", Committed),
        candidate(1, "other", "bottom", Active),
    ]);
    assert_eq!((order, rejected), (["bottom", "middle", "top", "other"].map(str::to_owned).to_vec(), Vec::new()));
}

#[test]
fn what_makes_no_sense_is_rejected_with_all_that_stands_on_it() {
    use Kind::{Active, Committed, View};
    let (order, rejected) = validated(vec![
        candidate(1, "fine", "", Committed),
        candidate(2, "twin-a", "", Committed),
        candidate(2, "twin-b", "fine", Committed),
        candidate(3, "on-twin", "twin-a", Committed),
        candidate(4, "on-on-twin", "on-twin", Active),
        candidate(5, "orphan", "gone", View),
        candidate(6, "active", "fine", Active),
        candidate(7, "on-active", "active", Active),
        candidate(8, "circle-a", "circle-b", Committed),
        candidate(9, "circle-b", "circle-a", Committed),
        candidate(10, "on-circle", "circle-a", Active),
        candidate(11, "itself", "itself", Committed),
        candidate(12, "double", "", Committed),
        candidate(13, "double", "", Committed),
        Candidate { name: "odd".to_owned(), record: Err(RejectReason::NoId) },
    ]);
    assert_eq!(order, ["fine", "active"]);
    assert_eq!(rejected.len(), 13, "{rejected:#?}");
    for claim in [
        "\"twin-a\": another snapshot has the same id 2",
        "\"twin-b\": another snapshot has the same id 2",
        "\"on-twin\": its parent \"twin-a\" is left out",
        "\"on-on-twin\": its parent \"on-twin\" is left out",
        "\"orphan\": its parent \"gone\" is missing",
        "\"on-active\": its parent \"active\" is not committed",
        "\"circle-a\": its parent \"circle-b\" is left out",
        "\"on-circle\": its parent \"circle-a\" is left out",
        "\"itself\": its parent \"itself\" is left out",
        "\"double\": another snapshot has the same name",
        "\"odd\": it has no id",
    ] {
        assert!(rejected.iter().any(|line| line.starts_with(claim)), "{claim} is missing in {rejected:#?}");
    }
}

#[test]
fn chain_of_any_length_is_accepted() {
    let chain = (1..=50_000).rev().map(|n| {
        let parent = if n == 1 { String::new() } else { (n - 1).to_string() };
        candidate(n, &n.to_string(), &parent, Kind::Committed)
    });
    let accepted = validate(chain.collect());
    assert_eq!((accepted.snapshots.len(), accepted.rejected.len()), (50_000, 0));
    assert_eq!(accepted.snapshots[0].key.as_str(), "1");
}
