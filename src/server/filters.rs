//! containerd's filter language: which snapshots a List returns. Pure.
//!
//! A List returns the snapshots that match any of its filters. A filter is `selector[,selector…]`, and all its
//! selectors must match. A selector is `field[.field…]`, alone (the field is present) or with `==`, `!=` or `~=`
//! (regular expression) and a value. `parser` has the syntax.
//!
//! Filters mean what they mean to containerd: the suite in `tests/containerd` compares both. Only regular expressions
//! differ at the edges (`\d` matches other digits than ASCII, `\Q…\E` exists in Go only). Invariant: the memory of
//! filters is bounded, and known before they are parsed.
#![forbid(unsafe_code)]

mod parser;

use std::fmt;

use regex::{Regex, RegexBuilder};

use self::parser::Counts;
use crate::model::{Key, LABEL_SNAPSHOT_REF, Snapshot};

/// Bytes of all filters of a List, as text. A quoted key has up to 128 KiB.
pub const MAX_BYTES: usize = 256 << 10;
/// Fields of all filters of a List. Each part of a name with dots counts.
const MAX_TERMS: usize = 1024;
/// Regular expressions of all filters of a List.
const MAX_REGEXES: usize = 32;
/// Bytes of a pattern. Two bytes of it, `\w`, take 6.4 KiB while it is compiled.
const MAX_PATTERN_BYTES: usize = 1 << 10;
/// Bytes of a compiled regular expression. A larger one is not used, and matches nothing.
const MAX_PROGRAM_BYTES: usize = 1 << 20;

/// What a regular expression takes at most: the program, and what searching and compiling need.
const MAX_REGEX_BYTES: usize = 4 << 20;
/// What a term takes besides its text.
const TERM_BYTES: usize = 512;
/// How many times a text is in memory at most: parsed, in a copy, and while it is unquoted.
const MAX_COPIES: usize = 3;

/// An upper bound for the bytes that these filters take when they are parsed.
pub fn estimate_memory(filters: &[String]) -> usize {
    let sum = |count: fn(&str) -> usize| -> usize { filters.iter().map(|text| count(text)).sum() };
    let terms = sum(|text| 1 + text.matches(['.', ',']).count()).min(MAX_TERMS);
    let regexes = sum(|text| text.matches("~=").count()).min(MAX_REGEXES);
    sum(str::len) * MAX_COPIES + terms * TERM_BYTES + regexes * MAX_REGEX_BYTES
}

/// Why a filter was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    pub filter: String,
    /// In bytes from the beginning of the filter.
    pub position: usize,
    pub reason: &'static str,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.reason, self.position)
    }
}

/// The filters of one List. If there are none, every snapshot matches.
#[derive(Clone, Debug)]
pub struct Filters(Vec<Filter>);

/// A snapshot matches if all selectors do.
#[derive(Clone, Debug)]
struct Filter(Vec<Selector>);

#[derive(Clone, Debug)]
struct Selector {
    /// The name of the field, split at its dots. It is not empty.
    path: Vec<Literal>,
    condition: Condition,
}

#[derive(Clone, Debug)]
enum Condition {
    Present,
    Equal(Literal),
    NotEqual(Literal),
    Matches(Regex),
    /// The regular expression is invalid or too large.
    MatchesNothing,
}

/// The name of a field, or a value.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Literal {
    Text(String),
    /// A quoted text whose escapes spell bytes that are not UTF-8. No snapshot has such a text, so it equals nothing.
    NotUtf8,
}

impl Literal {
    fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::NotUtf8 => None,
        }
    }
}

impl Condition {
    fn from_pattern(pattern: &Literal) -> Self {
        let compile = |pattern| RegexBuilder::new(pattern).size_limit(MAX_PROGRAM_BYTES).build().ok();
        pattern.as_str().and_then(compile).map_or(Self::MatchesNothing, Self::Matches)
    }
}

impl Filters {
    pub fn parse(filters: &[String]) -> Result<Self, ParseError> {
        let mut bytes = 0;
        let mut counts = Counts::default();
        let mut parsed = Vec::new();
        for text in filters {
            // An empty filter takes memory as well.
            bytes += text.len() + 1;
            if bytes > MAX_BYTES {
                let reason = "more than 256 KiB of filters";
                return Err(ParseError { filter: text.clone(), position: 0, reason });
            }
            parsed.push(parser::parse(text, &mut counts)?);
        }
        Ok(Self(parsed))
    }

    pub fn matches(&self, snapshot: &Snapshot) -> bool {
        self.0.is_empty() || self.0.iter().any(|filter| filter.matches(snapshot))
    }

    /// The (`snapshot.ref` label, parent) that every matching snapshot has, if the filters require one. containerd
    /// looks up a remote layer that way, and the store has an index for it.
    pub fn reference_and_parent(&self) -> Option<(&str, &str)> {
        let [filter] = self.0.as_slice() else { return None };
        let reference =
            filter.required_value(|path| label_name(path).is_some_and(|name| name == LABEL_SNAPSHOT_REF))?;
        let parent = filter.required_value(|path| path.first().and_then(Literal::as_str) == Some("parent"))?;
        Some((reference, parent))
    }
}

impl Filter {
    fn matches(&self, snapshot: &Snapshot) -> bool {
        self.0.iter().all(|selector| selector.matches(snapshot))
    }

    /// The value that the first matching field must be equal to.
    fn required_value(&self, is_field: impl Fn(&[Literal]) -> bool) -> Option<&str> {
        self.0.iter().find_map(|selector| match &selector.condition {
            Condition::Equal(value) if is_field(&selector.path) => value.as_str(),
            _ => None,
        })
    }
}

impl Selector {
    fn matches(&self, snapshot: &Snapshot) -> bool {
        let value = field_value(&self.path, snapshot);
        match &self.condition {
            Condition::Present => value.is_some(),
            Condition::Equal(literal) => value.is_some() && value == literal.as_str(),
            Condition::NotEqual(literal) => Some(value.unwrap_or_default()) != literal.as_str(),
            Condition::Matches(regex) => regex.is_match(value.unwrap_or_default()),
            Condition::MatchesNothing => false,
        }
    }
}

/// `None`: the snapshot has no such field.
fn field_value<'s>(path: &[Literal], snapshot: &'s Snapshot) -> Option<&'s str> {
    match path.first()?.as_str()? {
        "kind" => Some(snapshot.kind.as_str()),
        "name" => Some(snapshot.key.as_str()),
        "parent" => Some(snapshot.parent.as_ref().map_or("", Key::as_str)),
        "labels" => snapshot.labels.get(&label_name(path)?).map(String::as_str),
        _ => None,
    }
}

/// The label that a path names: all its parts after `labels`, joined by dots. `None`: it names no label.
fn label_name(path: &[Literal]) -> Option<String> {
    let (first, rest) = path.split_first()?;
    if first.as_str()? != "labels" {
        return None;
    }
    let parts: Option<Vec<&str>> = rest.iter().map(Literal::as_str).collect();
    parts.map(|parts| parts.join("."))
}

#[cfg(test)]
mod tests;
