use super::*;
use crate::model::Kind;
use crate::model::testing::local_snapshot;

fn snapshot() -> Snapshot {
    let labels = [("a", "1"), ("foo.bar", "baz"), (LABEL_SNAPSHOT_REF, "sha256:abc")];
    Snapshot {
        labels: labels.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
        ..local_snapshot(1, "default/1/my key", Kind::Committed)
    }
}

fn matches(filters: &[&str]) -> Result<bool, ParseError> {
    let filters: Vec<String> = filters.iter().map(|&f| f.to_owned()).collect();
    Ok(Filters::parse(&filters)?.matches(&snapshot()))
}

#[test]
fn matching_filters_match() {
    for filter in [
        "",
        "name",
        "parent",
        "parent==\"\"",
        "kind==committed",
        "kind == committed, name",
        "kind!=active",
        "unknown!=x",
        "labels.a",
        "labels.a==1",
        "labels.foo.bar==baz",
        "labels.\"foo.bar\"==baz",
        "labels.\"foo\".\"bar\"==baz",
        "labels.\"containerd.io/snapshot.ref\"==sha256:abc,parent==\"\"",
        "labels.nothing!=1",
        "labels.nothing~=\"^$\"",
        "name~=my",
        "name~=/my key$/",
        "name~=|^default/1|",
        "name==\"default\\u002f1/my\\x20key\"",
        "labels.a==\"\\061\"",
        "name!=\"\\xff\"",
        "name.\"\\xff\"",
    ] {
        assert_eq!(matches(&[filter]), Ok(true), "{filter}");
    }
    assert_eq!(matches(&[]), Ok(true));
    assert_eq!(matches(&["kind==active", "name"]), Ok(true));
}

#[test]
fn other_filters_do_not_match() {
    for filter in [
        "unknown",
        "labels",
        "labels.nothing",
        "kind==active",
        "kind==Committed",
        "labels.a==2",
        "labels.nothing==\"\"",
        "name~=\"(\"",
        "name==\"\\xff\"",
        "name~=\"\\xff\"",
        "labels.\"\\xff\"",
        "name~=^my",
        "kind==committed,labels.a==2",
    ] {
        assert_eq!(matches(&[filter]), Ok(false), "{filter}");
    }
    assert_eq!(matches(&["kind==active", "labels.nothing"]), Ok(false));
}

#[test]
fn invalid_filters_are_refused() {
    for filter in [
        " ",
        ",",
        "name ",
        "kind==committed , name",
        "parent~=.",
        "name==",
        "name=",
        "name=x",
        "name=!x",
        "==x",
        "name==x,",
        ",name",
        "name.",
        ".name",
        "name==x y",
        "name==/x/",
        "name==|x|",
        "|name|==x",
        "name==\"x",
        "name==\"\\q\"",
        "name==\"\\x4\"",
        "name==\"\\777\"",
        "name==\"\\U00110000\"",
        "name==\"a\nb\"",
        "name==x\0",
        "name\0",
        "-name==x",
        "name==\"x\"y",
        "name===x",
    ] {
        assert!(matches(&[filter]).is_err(), "{filter:?}");
        assert!(matches(&["name", filter]).is_err(), "{filter:?} as second");
    }
}

/// Without limits a message of 16 MiB could hold a million regular expressions of a megabyte each, or eight million
/// selectors.
#[test]
fn filters_beyond_a_limit_are_refused() {
    let many = |filter: &str, count: usize| matches(&vec![filter; count]);
    assert_eq!(many("name~=my", MAX_REGEXES), Ok(true));
    let refused = many("name~=my", MAX_REGEXES + 1).unwrap_err();
    assert_eq!(refused.to_string(), "more than 32 regular expressions at byte 6");
    assert!(matches(&[&["name~=my"; MAX_REGEXES + 1].join(",")]).is_err());
    for separator in [",", "."] {
        assert!(matches(&[&vec!["name"; MAX_TERMS].join(separator)]).is_ok());
        let refused = matches(&["name", &vec!["name"; MAX_TERMS].join(separator)]).unwrap_err();
        assert_eq!(refused.reason, "more than 1024 fields");
    }
    assert_eq!(matches(&[&format!("name~=/{}/", "(my)?".repeat(MAX_PATTERN_BYTES / 5))]), Ok(true));
    let refused = matches(&[&format!("name~=/{}/", r"\\w".repeat(MAX_PATTERN_BYTES / 2 + 1))]).unwrap_err();
    assert_eq!(refused.reason, "regular expression longer than 1 KiB");
    for (filter, count) in [(&*"x".repeat(MAX_BYTES), 1), ("", MAX_BYTES + 1)] {
        assert!(many(filter, count).unwrap_err().reason.contains("256 KiB"));
    }
    // This is the longest filter that containerd may need.
    let key = "\\U0010ffff".repeat(Key::MAX_BYTES / 4);
    assert_eq!(matches(&[&format!("parent==\"{key}\"")]), Ok(false));
}

/// The estimate is made before the filters are parsed, so it must never be less than what they take.
#[test]
fn estimated_memory_counts_text_terms_and_regexes() {
    let filters = |filter: &str, count: usize| vec![filter.to_owned(); count];
    assert_eq!(estimate_memory(&[]), 0);
    assert_eq!(estimate_memory(&filters("name", 2)), 2 * (4 * MAX_COPIES + TERM_BYTES));
    assert_eq!(estimate_memory(&filters("labels.a==1,name", 1)), 16 * MAX_COPIES + 3 * TERM_BYTES);
    assert_eq!(estimate_memory(&filters("a~=b", 2)), 2 * (4 * MAX_COPIES + TERM_BYTES + MAX_REGEX_BYTES));
    // Terms and expressions beyond the limits are refused, so they take no memory.
    assert_eq!(
        estimate_memory(&filters("a~=b", 2_000)),
        8_000 * MAX_COPIES + MAX_TERMS * TERM_BYTES + MAX_REGEXES * MAX_REGEX_BYTES
    );
}

#[test]
fn lookup_of_a_remote_layer_is_recognised() {
    let parse = |filters: &[&str]| Filters::parse(&filters.iter().map(|&f| f.to_owned()).collect::<Vec<_>>()).unwrap();
    let lookup = parse(&["labels.\"containerd.io/snapshot.ref\"==sha256:abc,parent==\"default/3/x y\""]);
    assert_eq!(lookup.reference_and_parent(), Some(("sha256:abc", "default/3/x y")));
    for other in [
        &["parent==a"][..],
        &["labels.\"containerd.io/snapshot.ref\"!=a,parent==a"],
        &["labels.\"containerd.io/snapshot.ref\"==a,parent==a", "name"],
        &["labels.\"containerd.io/snapshot.ref\"==a"],
        &[],
    ] {
        assert_eq!(parse(other).reference_and_parent(), None, "{other:?}");
    }
}

/// A value ends where Go's definition of a graphic character ends.
#[test]
fn unquoted_value_takes_graphic_characters_only() {
    for value in ["é", "½", "€", "e\u{301}", "日本", "a.b/c:d-e_f", "«»"] {
        assert_eq!(matches(&[&format!("name!={value}")]), Ok(true), "{value}");
    }
    // A space that does not break, one of no width, a tab, a comma, and a replacement character.
    for separator in ["\u{a0}", "\u{200b}", "\t", ",", "\u{fffd}"] {
        assert!(matches(&[&format!("name!=a{separator}=b")]).is_err(), "{separator:?}");
    }
}
