//! The command line.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use crate::magic::Visibility;

/// The implementation that reads the repository.
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
    /// The name length that statfs reports. The real client reports 0.
    pub name_length: u32,
    /// How long the kernel keeps names and attributes.
    pub ttl: Duration,
    pub magic_xattrs: Visibility,
    /// The user and the group to whom everything belongs, whatever the repository says.
    pub claimed_by: Option<(u32, u32)>,
    /// Between two tries to reach the server.
    pub retry_delay: Duration,
    pub reader: Reader,
}

impl Options {
    pub fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let (mut url, mut mountpoint, mut cache) = (None, None, None);
        let (mut name_length, mut ttl, mut reader) = (255, Duration::from_secs(60), Reader::Own);
        let (mut magic_xattrs, mut claimed_by, mut retry_delay) = (Visibility::RootOnly, None, Duration::ZERO);
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
                "--magic-xattrs" if text == "rootonly" => magic_xattrs = Visibility::RootOnly,
                "--magic-xattrs" if text == "always" => magic_xattrs = Visibility::Always,
                "--claim-ownership" => claimed_by = Some(owner(&text).ok_or_else(bad)?),
                "--retry-delay" => retry_delay = Duration::from_millis(text.parse().map_err(|_| bad())?),
                "--backend" if text == "own" => reader = Reader::Own,
                "--backend" if text == "crate" => reader = Reader::Library,
                "--backend" | "--magic-xattrs" => return Err(bad()),
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
            magic_xattrs,
            claimed_by,
            retry_delay,
            reader,
        })
    }
}

/// `UID:GID`.
fn owner(text: &str) -> Option<(u32, u32)> {
    let (uid, gid) = text.split_once(':')?;
    Some((uid.parse().ok()?, gid.parse().ok()?))
}
