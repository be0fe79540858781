//! containerd's filter language. Pure.
//!
//! `selector[,selector…]`, all of which must hold; a selector is `field[.field…]`, alone for
//! presence or with `==`, `!=` or `~=` and a value. Fields and values may be quoted like Go
//! strings; after `~=` also with `/` or `|`. Means what containerd means by it: the suite in
//! `tests/containerd` compares both on the same filters. Only inside a regular expression
//! the dialects differ at the edges (`\d` knows other digits than ASCII, `\Q…\E` is Go's).
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::LazyLock;

use regex::{Regex, RegexBuilder};

use crate::model::{Key, LABEL_SNAPSHOT_REF, Snapshot};

#[derive(Clone, Debug)]
pub struct Filters {
    /// Alternatives; none matches everything.
    any: Vec<Vec<Selector>>,
}

#[derive(Clone, Debug)]
struct Selector {
    path: Vec<Text>,
    test: Operator,
}

/// A field or a value. None: a quoted text whose escapes spell bytes that are not UTF-8.
/// No snapshot has such a text, so it equals nothing.
type Text = Option<String>;

#[derive(Clone, Debug)]
enum Operator {
    Present,
    Equal(Text),
    NotEqual(Text),
    /// None: not a regular expression, which matches nothing.
    Matches(Option<Box<Regex>>),
}

/// Compiled programs above this are refused, so that a filter cannot eat the memory.
const REGEX_BYTES: usize = 1 << 20;
/// And so many regular expressions in one List.
const MAX_REGEXES: usize = 32;
/// Longest pattern of one. Two bytes of it, `\w`, take 6.4 KiB while it is compiled.
const PATTERN_BYTES: usize = 1 << 10;
/// What one takes at most: the program, what it needs while it searches, and what compiling it needs.
const REGEX_MEMORY: usize = 4 << 20;
/// All filters of a List, as text. A quoted key has 128 KiB at most.
pub const MAX_BYTES: usize = 256 << 10;
/// Fields of all filters of a List, each part of their names counted.
const MAX_TERMS: usize = 1024;
/// What a term takes besides its text.
const TERM_BYTES: usize = 512;
/// How often a text is in memory at most: parsed, in a copy, and while it is unquoted.
const COPIES: usize = 3;

/// Bytes that these filters take at most. That is known before they are parsed.
pub fn estimate_memory(filters: &[String]) -> usize {
    let count = |found: fn(&str) -> usize| -> usize { filters.iter().map(|text| found(text)).sum() };
    let terms = count(|text| 1 + text.matches(['.', ',']).count()).min(MAX_TERMS);
    let regexes = count(|text| text.matches("~=").count()).min(MAX_REGEXES);
    count(str::len) * COPIES + terms * TERM_BYTES + regexes * REGEX_MEMORY
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    pub filter: String,
    pub at: usize,
    pub why: &'static str,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.why, self.at)
    }
}

impl Filters {
    pub fn parse(filters: &[String]) -> Result<Self, ParseError> {
        let mut bytes = 0;
        let mut counts = Counts::default();
        let mut all = Vec::new();
        for text in filters {
            let refuse = |why| Err(ParseError { filter: text.clone(), at: 0, why });
            // An empty one takes memory as well.
            bytes += text.len() + 1;
            if bytes > MAX_BYTES {
                return refuse("more than 256 KiB of filters are too many");
            }
            all.push(parse(text, &mut counts)?);
        }
        Ok(Self { any: all })
    }

    pub fn matches(&self, snapshot: &Snapshot) -> bool {
        self.any.is_empty() || self.any.iter().any(|all| all.iter().all(|selector| selector.matches(snapshot)))
    }

    /// The (snapshot.ref, parent) that every match has, if these filters name one.
    pub fn reference_and_parent(&self) -> Option<(&str, &str)> {
        let [all] = self.any.as_slice() else { return None };
        let equal = |is_wanted: fn(&[Text]) -> bool| {
            all.iter().find_map(|s| match &s.test {
                Operator::Equal(value) if is_wanted(&s.path) => value.as_deref(),
                _ => None,
            })
        };
        let reference = equal(|path| label_name(path).is_some_and(|name| name == LABEL_SNAPSHOT_REF))?;
        Some((reference, equal(|path| path.first().is_some_and(|f| f.as_deref() == Some("parent")))?))
    }
}

impl Selector {
    fn matches(&self, snapshot: &Snapshot) -> bool {
        let value = field(&self.path, snapshot);
        match &self.test {
            Operator::Present => value.is_some(),
            Operator::Equal(wanted) => value.is_some() && value == wanted.as_deref(),
            Operator::NotEqual(unwanted) => Some(value.unwrap_or_default()) != unwanted.as_deref(),
            Operator::Matches(regex) => regex.as_ref().is_some_and(|regex| regex.is_match(value.unwrap_or_default())),
        }
    }
}

fn field<'s>(path: &[Text], snapshot: &'s Snapshot) -> Option<&'s str> {
    match path.first()?.as_deref()? {
        "kind" => Some(snapshot.kind.as_str()),
        "name" => Some(snapshot.key.as_str()),
        "parent" => Some(snapshot.parent.as_ref().map_or("", Key::as_str)),
        "labels" => snapshot.labels.get(&label_name(path)?).map(String::as_str),
        _ => None,
    }
}

/// The label that a path names: all after `labels`, dots included.
fn label_name(path: &[Text]) -> Option<String> {
    match path.split_first()? {
        (Some(first), rest) if first == "labels" => {
            rest.iter().map(Option::as_deref).collect::<Option<Vec<_>>>().map(|parts| parts.join("."))
        }
        _ => None,
    }
}

fn parse(text: &str, counts: &mut Counts) -> Result<Vec<Selector>, ParseError> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let mut parser = Parser { text, at: 0, after_operator: false, counts };
    parser.selectors().map_err(|(at, why)| ParseError { filter: text.to_owned(), at, why })
}

type Failure = (usize, &'static str);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Token<'t> {
    Quoted(&'t str),
    Value(&'t str),
    Field(&'t str),
    Separator(&'t str),
    Operator(&'t str),
    End,
    Unexpected,
}

/// What all filters of a List have so far.
#[derive(Default)]
struct Counts {
    terms: usize,
    regexes: usize,
}

struct Parser<'t, 'c> {
    text: &'t str,
    /// The next character to read.
    at: usize,
    /// The next unquoted text is a value.
    after_operator: bool,
    counts: &'c mut Counts,
}

impl<'t> Parser<'t, '_> {
    fn selectors(&mut self) -> Result<Vec<Selector>, Failure> {
        let mut all = vec![self.selector()?];
        loop {
            match self.peek() {
                None => return Ok(all),
                Some(',') => {
                    self.token()?;
                    all.push(self.selector()?);
                }
                Some(_) => return Err((self.at, "unexpected input")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, Failure> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.token()?;
            path.push(self.field()?);
        }
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { path, test: Operator::Present });
        }
        let test = match self.operator()? {
            "==" => Operator::Equal(self.value("\"")?),
            "!=" => Operator::NotEqual(self.value("\"")?),
            _ => {
                let at = self.at;
                let pattern = self.value("\"/|")?;
                self.counts.regexes += 1;
                if self.counts.regexes > MAX_REGEXES {
                    return Err((at, "more than 32 regular expressions are too many"));
                }
                if pattern.as_ref().is_some_and(|pattern| pattern.len() > PATTERN_BYTES) {
                    return Err((at, "a regular expression of more than 1 KiB is too long"));
                }
                let compile = |p: String| RegexBuilder::new(&p).size_limit(REGEX_BYTES).build().ok();
                Operator::Matches(pattern.and_then(compile).map(Box::new))
            }
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<Text, Failure> {
        let (at, token) = self.token()?;
        self.counts.terms += 1;
        if self.counts.terms > MAX_TERMS {
            return Err((at, "more than 1024 fields are too many"));
        }
        match token {
            Token::Field(name) => Ok(Some(name.to_owned())),
            Token::Quoted(literal) => unquote(at, literal, "\""),
            _ => Err((at, "expected a field name")),
        }
    }

    fn operator(&mut self) -> Result<&'t str, Failure> {
        match self.token()? {
            (_, Token::Operator(operator @ ("==" | "!=" | "~="))) => Ok(operator),
            (at, _) => Err((at, "expected one of the operators ==, != and ~=")),
        }
    }

    fn value(&mut self, quotes: &str) -> Result<Text, Failure> {
        let (at, token) = self.token()?;
        match token {
            Token::Value(value) | Token::Field(value) => Ok(Some(value.to_owned())),
            Token::Quoted(literal) => unquote(at, literal, quotes),
            _ => Err((at, "expected a value")),
        }
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn skip_while(&mut self, wanted: impl Fn(char) -> bool) {
        while self.peek().is_some_and(&wanted) {
            self.next();
        }
    }

    /// The next token and where it begins, after any white space.
    fn token(&mut self) -> Result<(usize, Token<'t>), Failure> {
        self.skip_while(char::is_whitespace);
        let begin = self.at;
        let Some(first) = self.next() else { return Ok((begin, Token::End)) };
        let token = match first {
            '\0' | char::REPLACEMENT_CHARACTER => return Err((begin, "unexpected character")),
            '"' | '/' | '|' => {
                self.quoted(first, begin)?;
                Token::Quoted(&self.text[begin..self.at])
            }
            ',' | '.' => {
                self.after_operator = false;
                Token::Separator(&self.text[begin..self.at])
            }
            '=' | '!' | '~' => {
                self.skip_while(|c| matches!(c, '=' | '!' | '~'));
                self.after_operator = true;
                Token::Operator(&self.text[begin..self.at])
            }
            _ if self.after_operator => {
                self.skip_while(is_value_character);
                self.after_operator = false;
                Token::Value(&self.text[begin..self.at])
            }
            _ if is_field_character(first) => {
                self.skip_while(is_field_character);
                Token::Field(&self.text[begin..self.at])
            }
            _ => Token::Unexpected,
        };
        Ok((begin, token))
    }

    /// Reads to the closing quote; whether the escapes are right is seen when unquoting.
    fn quoted(&mut self, quote: char, begin: usize) -> Result<(), Failure> {
        loop {
            match self.next() {
                None | Some('\n' | '\0' | char::REPLACEMENT_CHARACTER) => {
                    return Err((begin, "a quoted text is not terminated"));
                }
                Some('\\') => {
                    self.next();
                }
                Some(c) if c == quote => return Ok(()),
                Some(_) => {}
            }
        }
    }
}

fn is_field_character(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

/// What Go calls graphic, without white space and the comma.
fn is_value_character(c: char) -> bool {
    static GRAPHIC: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^[\p{L}\p{M}\p{N}\p{P}\p{S}]$").ok());
    match c {
        ',' | char::REPLACEMENT_CHARACTER => false,
        c if c.is_ascii() => c.is_ascii_graphic(),
        c => GRAPHIC.as_ref().is_some_and(|graphic| graphic.is_match(c.encode_utf8(&mut [0; 4]))),
    }
}

/// The text that a Go string literal stands for, if it is quoted with one of `quotes`.
fn unquote(at: usize, literal: &str, quotes: &str) -> Result<Text, Failure> {
    const SYNTAX: &str = "invalid escape in a quoted text";
    let quote = literal.chars().next().filter(|q| quotes.contains(*q)).ok_or((at, "only ~= takes this quote"))?;
    let mut rest = &literal[1..literal.len() - 1];
    // Escapes name bytes, so only the whole is text again.
    let mut bytes = Vec::with_capacity(rest.len());
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        if c != '\\' {
            bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        let escape = rest.chars().next().ok_or((at, SYNTAX))?;
        rest = &rest[escape.len_utf8()..];
        let mut digits = |count: usize, radix: u32, seen: &str| {
            let more = rest.get(..count)?;
            rest = &rest[count..];
            let all = format!("{seen}{more}");
            all.chars().all(|c| c.is_digit(radix)).then(|| u32::from_str_radix(&all, radix).ok()).flatten()
        };
        match escape {
            'a' => bytes.push(0x07),
            'b' => bytes.push(0x08),
            'f' => bytes.push(0x0c),
            'n' => bytes.push(b'\n'),
            'r' => bytes.push(b'\r'),
            't' => bytes.push(b'\t'),
            'v' => bytes.push(0x0b),
            '\\' => bytes.push(b'\\'),
            c if c == quote => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            'x' => {
                let byte = digits(2, 16, "").and_then(|v| u8::try_from(v).ok()).ok_or((at, SYNTAX))?;
                bytes.push(byte);
            }
            '0'..='7' => {
                let value = digits(2, 8, escape.encode_utf8(&mut [0; 4]));
                bytes.push(value.and_then(|v| u8::try_from(v).ok()).ok_or((at, SYNTAX))?);
            }
            'u' | 'U' => {
                let value = digits(if escape == 'u' { 4 } else { 8 }, 16, "").ok_or((at, SYNTAX))?;
                match (value, char::from_u32(value)) {
                    (_, Some(c)) => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    // Half a surrogate pair.
                    (..=0x0010_ffff, None) => bytes.extend_from_slice("\u{fffd}".as_bytes()),
                    // Negative in containerd's signed arithmetic, which keeps the last byte.
                    (0x8000_0000.., None) => bytes.push(value.to_le_bytes()[0]),
                    (_, None) => return Err((at, SYNTAX)),
                }
            }
            _ => return Err((at, SYNTAX)),
        }
    }
    Ok(String::from_utf8(bytes).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Kind, SnapshotId, Timestamp};

    fn snapshot() -> Snapshot {
        let labels = [("a", "1"), ("foo.bar", "baz"), (LABEL_SNAPSHOT_REF, "sha256:abc")];
        Snapshot {
            id: SnapshotId(1),
            key: Key::parse("default/1/my key").unwrap(),
            parent: None,
            kind: Kind::Committed,
            created: Timestamp(0),
            updated: Timestamp(0),
            labels: labels.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
            layer: None,
            usage: None,
        }
    }

    fn matches(filters: &[&str]) -> Result<bool, ParseError> {
        let filters: Vec<String> = filters.iter().map(|&f| f.to_owned()).collect();
        Ok(Filters::parse(&filters)?.matches(&snapshot()))
    }

    #[test]
    fn filters_that_match() {
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
    fn filters_that_do_not_match() {
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
    fn filters_that_are_refused() {
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

    /// A message of 16 MiB held a million regular expressions, each of which may take a megabyte,
    /// or eight million selectors.
    #[test]
    fn filters_that_would_eat_the_memory_are_refused() {
        let many = |filter: &str, count: usize| matches(&vec![filter; count]);
        assert_eq!(many("name~=my", MAX_REGEXES), Ok(true));
        let refused = many("name~=my", MAX_REGEXES + 1).unwrap_err();
        assert_eq!(refused.to_string(), "more than 32 regular expressions are too many at byte 6");
        assert!(matches(&[&["name~=my"; MAX_REGEXES + 1].join(",")]).is_err());
        for separator in [",", "."] {
            assert!(matches(&[&vec!["name"; MAX_TERMS].join(separator)]).is_ok());
            let refused = matches(&["name", &vec!["name"; MAX_TERMS].join(separator)]).unwrap_err();
            assert_eq!(refused.why, "more than 1024 fields are too many");
        }
        assert_eq!(matches(&[&format!("name~=/{}/", "(my)?".repeat(PATTERN_BYTES / 5))]), Ok(true));
        let refused = matches(&[&format!("name~=/{}/", r"\\w".repeat(PATTERN_BYTES / 2 + 1))]).unwrap_err();
        assert_eq!(refused.why, "a regular expression of more than 1 KiB is too long");
        for (filter, count) in [(&*"x".repeat(MAX_BYTES), 1), ("", MAX_BYTES + 1)] {
            assert!(many(filter, count).unwrap_err().why.contains("256 KiB"));
        }
        // As much as containerd may have to ask.
        let key = "\\U0010ffff".repeat(Key::MAX_BYTES / 4);
        assert_eq!(matches(&[&format!("parent==\"{key}\"")]), Ok(false));
    }

    /// It is counted before it is parsed, so it is never less than what was parsed.
    #[test]
    fn memory_of_filters_covers_what_is_parsed_of_them() {
        let filters = |filter: &str, count: usize| vec![filter.to_owned(); count];
        assert_eq!(estimate_memory(&[]), 0);
        assert_eq!(estimate_memory(&filters("name", 2)), 2 * (4 * COPIES + TERM_BYTES));
        assert_eq!(estimate_memory(&filters("labels.a==1,name", 1)), 16 * COPIES + 3 * TERM_BYTES);
        assert_eq!(estimate_memory(&filters("a~=b", 2)), 2 * (4 * COPIES + TERM_BYTES + REGEX_MEMORY));
        // Terms and expressions beyond the limits are not counted, because they are refused.
        assert_eq!(
            estimate_memory(&filters("a~=b", 2_000)),
            8_000 * COPIES + MAX_TERMS * TERM_BYTES + MAX_REGEXES * REGEX_MEMORY
        );
    }

    #[test]
    fn the_question_after_a_remote_layer_is_recognised() {
        let parse =
            |filters: &[&str]| Filters::parse(&filters.iter().map(|&f| f.to_owned()).collect::<Vec<_>>()).unwrap();
        let asked = parse(&["labels.\"containerd.io/snapshot.ref\"==sha256:abc,parent==\"default/3/x y\""]);
        assert_eq!(asked.reference_and_parent(), Some(("sha256:abc", "default/3/x y")));
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
}
