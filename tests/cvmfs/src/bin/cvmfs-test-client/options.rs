//! The command line.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Who reads the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    Own,
    Library,
}

#[derive(Debug)]
pub struct Options {
    pub url: String,
    pub mountpoint: PathBuf,
    pub cache: PathBuf,
    /// What statfs says; the real client says 0.
    pub name_length: u32,
    /// How long the kernel keeps names and attributes.
    pub ttl: Duration,
    pub reader: Reader,
}

impl Options {
    pub fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let (mut url, mut mountpoint, mut cache) = (None, None, None);
        let (mut name_length, mut ttl, mut reader) = (255, Duration::from_secs(60), Reader::Own);
        while let Some(option) = words.next() {
            let option = option.to_string_lossy().into_owned();
            let value = words.next().ok_or_else(|| format!("read the command line: {option} needs a value"))?;
            let text = value.to_string_lossy();
            let bad = || format!("read the command line: {option} cannot be {text:?}");
            match option.as_str() {
                "--url" => url = Some(text.trim_end_matches('/').to_owned()),
                "--mountpoint" => mountpoint = Some(PathBuf::from(&value)),
                "--cache" => cache = Some(PathBuf::from(&value)),
                "--name-length" => name_length = text.parse().map_err(|_| bad())?,
                "--ttl" => ttl = Duration::from_secs(text.parse().map_err(|_| bad())?),
                "--backend" if text == "own" => reader = Reader::Own,
                "--backend" if text == "crate" => reader = Reader::Library,
                "--backend" => return Err(bad()),
                _ => return Err(format!("read the command line: there is no option {option}")),
            }
        }
        let missing = |option| format!("read the command line: {option} is missing");
        Ok(Self {
            url: url.ok_or_else(|| missing("--url"))?,
            mountpoint: mountpoint.ok_or_else(|| missing("--mountpoint"))?,
            cache: cache.ok_or_else(|| missing("--cache"))?,
            name_length,
            ttl,
            reader,
        })
    }
}
