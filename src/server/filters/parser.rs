//! The syntax of containerd's filters, from text to selectors. Pure.
//!
//! Names and values may be quoted like Go strings, and after `~=` also with `/` or `|`. What is accepted and where a
//! token ends is what containerd's scanner does, including its oddities. Invariant: no more terms and regular
//! expressions are kept than the limits of `filters` allow.
#![forbid(unsafe_code)]

use std::str::Chars;
use std::sync::LazyLock;

use regex::Regex;

use super::{Condition, Filter, Literal, MAX_PATTERN_BYTES, MAX_REGEXES, MAX_TERMS, ParseError, Selector};

/// What all filters of a List have so far.
#[derive(Default)]
pub(super) struct Counts {
    terms: usize,
    regexes: usize,
}

/// Parses one filter. An empty one has no selectors.
pub(super) fn parse(text: &str, counts: &mut Counts) -> Result<Filter, ParseError> {
    if text.is_empty() {
        return Ok(Filter(Vec::new()));
    }
    let mut parser = Parser { scanner: Scanner { text, position: 0, expects_value: false }, counts };
    parser.filter().map_err(|SyntaxError { position, reason }| ParseError { filter: text.to_owned(), position, reason })
}

#[derive(Debug)]
struct SyntaxError {
    position: usize,
    reason: &'static str,
}

impl SyntaxError {
    fn at(position: usize, reason: &'static str) -> Self {
        Self { position, reason }
    }
}

const DOUBLE_QUOTE: &str = "\"";
const PATTERN_QUOTES: &str = "\"/|";

/// Each method parses what its name says, at the position of the scanner.
struct Parser<'t, 'c> {
    scanner: Scanner<'t>,
    counts: &'c mut Counts,
}

impl<'t> Parser<'t, '_> {
    fn filter(&mut self) -> Result<Filter, SyntaxError> {
        let mut selectors = vec![self.selector()?];
        loop {
            match self.scanner.peek() {
                None => return Ok(Filter(selectors)),
                Some(',') => {
                    self.scanner.next_token()?;
                    selectors.push(self.selector()?);
                }
                Some(_) => return Err(SyntaxError::at(self.scanner.position, "unexpected input")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, SyntaxError> {
        let mut path = vec![self.field()?];
        while self.scanner.peek() == Some('.') {
            self.scanner.next_token()?;
            path.push(self.field()?);
        }
        let condition = match self.scanner.peek() {
            None | Some(',') => Condition::Present,
            Some(_) => self.condition()?,
        };
        Ok(Selector { path, condition })
    }

    fn condition(&mut self) -> Result<Condition, SyntaxError> {
        match self.operator()? {
            "==" => Ok(Condition::Equal(self.value(DOUBLE_QUOTE)?)),
            "!=" => Ok(Condition::NotEqual(self.value(DOUBLE_QUOTE)?)),
            _ => self.pattern(),
        }
    }

    fn pattern(&mut self) -> Result<Condition, SyntaxError> {
        let position = self.scanner.position;
        let pattern = self.value(PATTERN_QUOTES)?;
        self.counts.regexes += 1;
        if self.counts.regexes > MAX_REGEXES {
            return Err(SyntaxError::at(position, "more than 32 regular expressions"));
        }
        match &pattern {
            Literal::Text(text) if text.len() > MAX_PATTERN_BYTES => {
                Err(SyntaxError::at(position, "regular expression longer than 1 KiB"))
            }
            Literal::Text(_) | Literal::NotUtf8 => Ok(Condition::from_pattern(&pattern)),
        }
    }

    fn field(&mut self) -> Result<Literal, SyntaxError> {
        let (position, token) = self.scanner.next_token()?;
        self.counts.terms += 1;
        if self.counts.terms > MAX_TERMS {
            return Err(SyntaxError::at(position, "more than 1024 fields"));
        }
        match token {
            Token::Field(name) => Ok(Literal::Text(name.to_owned())),
            Token::Quoted(quoted) => unquote(position, quoted, DOUBLE_QUOTE),
            Token::Value(_) | Token::Separator | Token::Operator(_) | Token::End | Token::Unexpected => {
                Err(SyntaxError::at(position, "expected a field name"))
            }
        }
    }

    fn operator(&mut self) -> Result<&'t str, SyntaxError> {
        match self.scanner.next_token()? {
            (_, Token::Operator(operator @ ("==" | "!=" | "~="))) => Ok(operator),
            (position, _) => Err(SyntaxError::at(position, "expected one of the operators ==, != and ~=")),
        }
    }

    fn value(&mut self, allowed_quotes: &str) -> Result<Literal, SyntaxError> {
        let (position, token) = self.scanner.next_token()?;
        match token {
            Token::Value(value) | Token::Field(value) => Ok(Literal::Text(value.to_owned())),
            Token::Quoted(quoted) => unquote(position, quoted, allowed_quotes),
            Token::Separator | Token::Operator(_) | Token::End | Token::Unexpected => {
                Err(SyntaxError::at(position, "expected a value"))
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Token<'t> {
    /// With its quotes and escapes.
    Quoted(&'t str),
    Value(&'t str),
    Field(&'t str),
    /// `,` or `.`.
    Separator,
    Operator(&'t str),
    End,
    Unexpected,
}

struct Scanner<'t> {
    text: &'t str,
    /// The next character to read, in bytes from the beginning.
    position: usize,
    /// An operator was read, so the next unquoted text is a value. That stays so after a quoted text, as in containerd.
    expects_value: bool,
}

impl<'t> Scanner<'t> {
    fn peek(&self) -> Option<char> {
        self.text[self.position..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.position += next.len_utf8();
        Some(next)
    }

    fn skip_while(&mut self, condition: impl Fn(char) -> bool) {
        while self.peek().is_some_and(&condition) {
            self.next();
        }
    }

    /// Reads a token after any white space. The result also says where it begins.
    fn next_token(&mut self) -> Result<(usize, Token<'t>), SyntaxError> {
        self.skip_while(char::is_whitespace);
        let begin = self.position;
        let Some(first) = self.next() else { return Ok((begin, Token::End)) };
        let token = match first {
            '\0' | char::REPLACEMENT_CHARACTER => return Err(SyntaxError::at(begin, "unexpected character")),
            '"' | '/' | '|' => {
                self.skip_quoted(first, begin)?;
                Token::Quoted(&self.text[begin..self.position])
            }
            ',' | '.' => {
                self.expects_value = false;
                Token::Separator
            }
            '=' | '!' | '~' => {
                self.skip_while(|c| matches!(c, '=' | '!' | '~'));
                self.expects_value = true;
                Token::Operator(&self.text[begin..self.position])
            }
            _ if self.expects_value => {
                self.skip_value();
                self.expects_value = false;
                Token::Value(&self.text[begin..self.position])
            }
            _ if is_field_character(first) => {
                self.skip_while(is_field_character);
                Token::Field(&self.text[begin..self.position])
            }
            _ => Token::Unexpected,
        };
        Ok((begin, token))
    }

    /// Reads to the closing quote. Whether the escapes are valid is for `unquote`.
    fn skip_quoted(&mut self, quote: char, begin: usize) -> Result<(), SyntaxError> {
        loop {
            match self.next() {
                None | Some('\n' | '\0' | char::REPLACEMENT_CHARACTER) => {
                    return Err(SyntaxError::at(begin, "quoted text is not terminated"));
                }
                Some('\\') => {
                    self.next();
                }
                Some(c) if c == quote => return Ok(()),
                Some(_) => {}
            }
        }
    }

    /// Reads the rest of an unquoted value: characters that Go calls graphic, without white space and the comma.
    fn skip_value(&mut self) {
        static VALUE: LazyLock<Option<Regex>> =
            LazyLock::new(|| Regex::new(r"^[\p{L}\p{M}\p{N}\p{P}\p{S}--[,\x{FFFD}]]*").ok());
        // containerd's own questions are ASCII, and the regular expression takes memory for as long as the process lives.
        let rest = &self.text[self.position..];
        self.position += rest.find(|c: char| !c.is_ascii_graphic() || c == ',').unwrap_or(rest.len());
        if self.peek().is_none_or(|c| c.is_ascii()) {
            return;
        }
        let value = VALUE.as_ref().and_then(|value| value.find(&self.text[self.position..]));
        self.position += value.map_or(0, |value| value.len());
    }
}

fn is_field_character(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

/// Decodes a quoted token as Go decodes a string literal. The quote must be one of `allowed_quotes`.
fn unquote(position: usize, quoted: &str, allowed_quotes: &str) -> Result<Literal, SyntaxError> {
    let quote = quoted
        .chars()
        .next()
        .filter(|quote| allowed_quotes.contains(*quote))
        .ok_or(SyntaxError::at(position, "only ~= takes this quote"))?;
    let mut chars = quoted[1..quoted.len() - 1].chars();
    // Escapes name bytes, so only the whole text can be checked for UTF-8.
    let mut bytes = Vec::with_capacity(quoted.len());
    while let Some(c) = chars.next() {
        if c == '\\' {
            push_escaped(&mut bytes, &mut chars, quote)
                .ok_or(SyntaxError::at(position, "invalid escape in a quoted text"))?;
        } else {
            push_char(&mut bytes, c);
        }
    }
    Ok(String::from_utf8(bytes).map_or(Literal::NotUtf8, Literal::Text))
}

/// Decodes an escape sequence, of which the backslash was read. `None`: it is invalid.
fn push_escaped(bytes: &mut Vec<u8>, chars: &mut Chars<'_>, quote: char) -> Option<()> {
    match chars.next()? {
        'a' => bytes.push(0x07),
        'b' => bytes.push(0x08),
        'f' => bytes.push(0x0c),
        'n' => bytes.push(b'\n'),
        'r' => bytes.push(b'\r'),
        't' => bytes.push(b'\t'),
        'v' => bytes.push(0x0b),
        '\\' => bytes.push(b'\\'),
        c if c == quote => push_char(bytes, c),
        'x' => bytes.push(u8::try_from(read_number(chars, 0, 2, 16)?).ok()?),
        first @ '0'..='7' => bytes.push(u8::try_from(read_number(chars, first.to_digit(8)?, 2, 8)?).ok()?),
        'u' => push_code_point(bytes, read_number(chars, 0, 4, 16)?)?,
        'U' => push_code_point(bytes, read_number(chars, 0, 8, 16)?)?,
        _ => return None,
    }
    Some(())
}

/// Appends exactly `digits` digits to `number`. `None`: one is missing or is no digit.
fn read_number(chars: &mut Chars<'_>, number: u32, digits: usize, radix: u32) -> Option<u32> {
    (0..digits).try_fold(number, |number, _| Some(number * radix + chars.next()?.to_digit(radix)?))
}

fn push_char(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

fn push_code_point(bytes: &mut Vec<u8>, code_point: u32) -> Option<()> {
    match (code_point, char::from_u32(code_point)) {
        (_, Some(c)) => push_char(bytes, c),
        // Half of a surrogate pair becomes a replacement character.
        (..=0x0010_ffff, None) => push_char(bytes, char::REPLACEMENT_CHARACTER),
        // containerd's signed arithmetic takes this for a negative number, and keeps the last byte.
        (0x8000_0000.., None) => bytes.push(code_point.to_le_bytes()[0]),
        (_, None) => return None,
    }
    Some(())
}
