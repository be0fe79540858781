//! Keys: the names that clients give to snapshots.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Quoted;

/// The name of a snapshot, as its client chose it. Any text is allowed, because it never becomes part of a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Key(String);

impl TryFrom<String> for Key {
    type Error = InvalidKey;

    fn try_from(text: String) -> Result<Self, InvalidKey> {
        Self::parse(&text)
    }
}

impl Key {
    /// Maximum length in bytes. containerd's own store has the same bound.
    pub const MAX_BYTES: usize = 32_768;

    pub fn parse(text: &str) -> Result<Self, InvalidKey> {
        match text.len() {
            0 => Err(InvalidKey::Empty),
            n if n > Self::MAX_BYTES => Err(InvalidKey::TooLong { bytes: n }),
            _ => Ok(Self(text.to_owned())),
        }
    }

    /// Like `parse`, but an empty text means that there is no key, as it does on the wire.
    pub fn parse_optional(text: &str) -> Result<Option<Self>, InvalidKey> {
        if text.is_empty() { Ok(None) } else { Self::parse(text).map(Some) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Quoted(&self.0).fmt(f)
    }
}

/// Why a text is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidKey {
    Empty,
    TooLong { bytes: usize },
}

impl fmt::Display for InvalidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("a snapshot key must not be empty"),
            Self::TooLong { bytes } => {
                write!(f, "a snapshot key of {bytes} bytes is too long, the limit is {}", Key::MAX_BYTES)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_is_any_text_within_its_bounds() {
        assert_eq!(Key::parse(""), Err(InvalidKey::Empty));
        assert!(Key::parse(&"k".repeat(Key::MAX_BYTES)).is_ok());
        assert_eq!(Key::parse(&"k".repeat(32_769)), Err(InvalidKey::TooLong { bytes: 32_769 }));
        assert!(Key::parse("k8s.io/12/../../etc \0 \n").is_ok());
        assert_eq!(Key::parse_optional(""), Ok(None));
    }

    #[test]
    fn long_key_is_shortened_in_messages() {
        let text = Key::parse(&"é".repeat(3000)).unwrap().to_string();
        assert!(text.ends_with("… (6000 bytes)"), "{text}");
    }
}
