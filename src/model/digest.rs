//! Digests of layers.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

/// A SHA-256 digest in its one canonical spelling: `sha256:` and 64 lower-case hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Digest(String);

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        Self::parse(&text)
    }
}

impl Digest {
    const ALGORITHM: &'static str = "sha256:";
    const HEX_DIGITS: usize = 64;

    pub fn parse(text: &str) -> Result<Self, InvalidDigest> {
        let hex = text.strip_prefix(Self::ALGORITHM).ok_or(InvalidDigest::Algorithm)?;
        if hex.len() != Self::HEX_DIGITS {
            return Err(InvalidDigest::Length { digits: hex.len() });
        }
        if !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(InvalidDigest::NotLowerHex);
        }
        Ok(Self(text.to_owned()))
    }

    pub fn hex(&self) -> &str {
        &self.0[Self::ALGORITHM.len()..]
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is no digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidDigest {
    Algorithm,
    Length { digits: usize },
    NotLowerHex,
}

impl fmt::Display for InvalidDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Algorithm => f.write_str("a layer digest must begin with \"sha256:\""),
            Self::Length { digits } => {
                write!(f, "a sha256 digest has {} hex digits, not {digits}", Digest::HEX_DIGITS)
            }
            Self::NotLowerHex => f.write_str("a sha256 digest is written in lower-case hex digits"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_has_one_spelling() {
        let good = format!("sha256:{}", "0123456789abcdef".repeat(4));
        assert_eq!(Digest::parse(&good).map(|d| d.hex().to_owned()), Ok("0123456789abcdef".repeat(4)));
        for (bad, why) in [
            (String::new(), InvalidDigest::Algorithm),
            ("0".repeat(64), InvalidDigest::Algorithm),
            (format!("sha512:{}", "0".repeat(128)), InvalidDigest::Algorithm),
            (format!("SHA256:{}", "0".repeat(64)), InvalidDigest::Algorithm),
            ("sha256:".to_owned(), InvalidDigest::Length { digits: 0 }),
            (format!("sha256:{}", "0".repeat(65)), InvalidDigest::Length { digits: 65 }),
            (format!("sha256:{}", "A".repeat(64)), InvalidDigest::NotLowerHex),
            (format!("sha256:../{}", "0".repeat(61)), InvalidDigest::NotLowerHex),
            (format!("sha256:{}\0", "0".repeat(63)), InvalidDigest::NotLowerHex),
            (format!("sha256:{}", "é".repeat(32)), InvalidDigest::NotLowerHex),
        ] {
            assert_eq!(Digest::parse(&bad), Err(why), "{bad:?}");
        }
    }
}
