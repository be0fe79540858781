use super::*;
use crate::model::{Labels, Timestamp};

fn candidate(id: u64, key: &str, parent: &str, kind: Kind) -> Candidate {
    let record = Snapshot {
        id: SnapshotId(id),
        key: Key::parse(key).unwrap(),
        parent: Key::parse_optional(parent).unwrap(),
        kind,
        created: Timestamp(0),
        updated: Timestamp(0),
        labels: Labels::new(),
        layer: None,
        usage: None,
    };
    Candidate { name: key.to_owned(), record: Ok(record) }
}

fn kept(candidates: Vec<Candidate>) -> (Vec<String>, Vec<String>) {
    let kept = validate(candidates);
    let mut left_out: Vec<String> = kept.left_out.iter().map(|l| format!("{}: {}", l.name, l.why)).collect();
    left_out.sort();
    (kept.snapshots.iter().map(|s| s.key.as_str().to_owned()).collect(), left_out)
}

#[test]
fn parents_come_before_their_children() {
    use Kind::{Active, Committed};
    let (order, left_out) = kept(vec![
        candidate(4, "top", "middle", Active),
        candidate(3, "middle", "bottom", Committed),
        candidate(2, "bottom", "", Committed),
        candidate(1, "other", "bottom", Active),
    ]);
    assert_eq!((order, left_out), (["bottom", "middle", "top", "other"].map(str::to_owned).to_vec(), Vec::new()));
}

#[test]
fn what_makes_no_sense_is_left_out_with_all_that_stands_on_it() {
    use Kind::{Active, Committed, View};
    let (order, left_out) = kept(vec![
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
    assert_eq!(left_out.len(), 13, "{left_out:#?}");
    for claim in [
        "\"twin-a\": another one has the same number 2",
        "\"twin-b\": another one has the same number 2",
        "\"on-twin\": its parent \"twin-a\" is left out",
        "\"on-on-twin\": its parent \"on-twin\" is left out",
        "\"orphan\": its parent \"gone\" is missing",
        "\"on-active\": its parent \"active\" is not committed",
        "\"circle-a\": its parent \"circle-b\" is left out",
        "\"on-circle\": its parent \"circle-a\" is left out",
        "\"itself\": its parent \"itself\" is left out",
        "\"double\": another one has the same name",
        "\"odd\": it has no number",
    ] {
        assert!(left_out.iter().any(|line| line.starts_with(claim)), "{claim} is missing in {left_out:#?}");
    }
}

#[test]
fn a_chain_of_any_length_is_followed() {
    let chain = (1..=50_000).rev().map(|n| {
        let parent = if n == 1 { String::new() } else { (n - 1).to_string() };
        candidate(n, &n.to_string(), &parent, Kind::Committed)
    });
    let kept = validate(chain.collect());
    assert_eq!((kept.snapshots.len(), kept.left_out.len()), (50_000, 0));
    assert_eq!(kept.snapshots[0].key.as_str(), "1");
}
