//! The CernVM-FS repository format as far as both publisher and client need it: object names,
//! path keys, entry flags and the manifest. Knows nothing of files on a disk or of a network.

#![forbid(unsafe_code)]

use std::fmt::{self, Display, Formatter, Write as _};
use std::str::FromStr;

use md5::{Digest as _, Md5};
use sha1::Sha1;

/// Directory.
pub const DIRECTORY: u32 = 1;
/// Directory whose content is in a nested catalog (the entry in the parent's catalog).
pub const NESTED_MOUNTPOINT: u32 = 2;
/// Everything that is no directory.
pub const FILE: u32 = 4;
/// Symbolic link; together with [`FILE`].
pub const SYMLINK: u32 = 8;
/// Device, fifo or socket; together with [`FILE`].
pub const SPECIAL: u32 = 16;
/// Directory that is the root of this nested catalog (the entry in the catalog itself).
pub const NESTED_ROOT: u32 = 32;
/// Regular file cut into chunks. This publisher never does that.
pub const CHUNKED: u32 = 64;

pub const MANIFEST: &str = ".cvmfspublished";
pub const WHITELIST: &str = ".cvmfswhitelist";

/// The kind of an object, which the letter at the end of its name encodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Catalog,
    Certificate,
    History,
}

impl Kind {
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::File => "",
            Self::Catalog => "C",
            Self::Certificate => "X",
            Self::History => "H",
        }
    }
}

/// The SHA-1 of an object's compressed bytes: its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 20]);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha1::digest(bytes).into())
    }

    /// From the `hash` column of a catalog; `None` unless it has 20 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub const fn as_bytes(&self) -> &[u8; 20] {
        &self.0
    }

    /// The object's path below the repository's URL: `data/<2 hex>/<38 hex><letter>`.
    pub fn object_path(&self, kind: Kind) -> String {
        let hex = self.to_string();
        format!("data/{}/{}{}", &hex[..2], &hex[2..], kind.suffix())
    }
}

impl Display for Digest {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Digest {
    type Err = Malformed;

    fn from_str(hex: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed { what: "digest", found: hex.to_owned() };
        if hex.len() != 40 || !hex.is_ascii() {
            return Err(malformed());
        }
        let mut bytes = [0; 20];
        for (byte, at) in bytes.iter_mut().zip((0..40).step_by(2)) {
            *byte = u8::from_str_radix(&hex[at..at + 2], 16).map_err(|_| malformed())?;
        }
        Ok(Self(bytes))
    }
}

/// The key of a path in a catalog: its MD5 as two little-endian halves. The root is the empty
/// path, every other path begins with a slash and ends without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathKey(pub i64, pub i64);

impl PathKey {
    /// The parent of the repository's root directory.
    pub const NONE: Self = Self(0, 0);

    pub fn of(path: &[u8]) -> Self {
        let digest: [u8; 16] = Md5::digest(path).into();
        let number = i128::from_le_bytes(digest);
        let half = |shift: u32| {
            let bytes = (number >> shift).to_le_bytes();
            i64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
        };
        Self(half(0), half(64))
    }
}

/// The directory that holds `path`; the empty path for what lies at the top.
pub fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&byte| byte == b'/').map_or(b"", |slash| &path[..slash])
}

/// The last component of `path`.
pub fn name(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&byte| byte == b'/').map_or(path, |slash| &path[slash + 1..])
}

/// `name` in the directory `path`.
pub fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    [path, b"/", name].concat()
}

/// The signed head of a repository: which root catalog is the current one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub root: Digest,
    /// Bytes of the root catalog, decompressed.
    pub root_size: u64,
    pub revision: u64,
    pub fqrn: String,
    pub certificate: Digest,
    pub history: Digest,
    /// Seconds since the epoch.
    pub published: u64,
}

impl Manifest {
    /// The lines that are hashed and signed.
    pub fn lines(&self) -> String {
        let mut lines = String::new();
        // R is the MD5 of the root path, D the seconds between two looks of a client.
        write!(
            lines,
            "C{}\nB{}\nRd41d8cd98f00b204e9800998ecf8427e\nD240\nS{}\nGno\nAno\nN{}\nX{}\nH{}\nT{}\n",
            self.root, self.root_size, self.revision, self.fqrn, self.certificate, self.history, self.published
        )
        .expect("a String takes every line");
        lines
    }

    /// Reads a manifest and compares the hash under it; the signature is not verified here.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let bad = |what| Malformed { what, found: String::from_utf8_lossy(bytes).into_owned() };
        let end = bytes.windows(3).position(|window| window == b"--\n").ok_or_else(|| bad("manifest without hash"))?;
        let (lines, rest) = bytes.split_at(end);
        if rest.get(3..43) != Some(Digest::of(lines).to_string().as_bytes()) {
            return Err(bad("manifest with a wrong hash"));
        }
        let text = std::str::from_utf8(lines).map_err(|_| bad("manifest"))?;
        let field =
            |letter: char, what| text.lines().find_map(|line| line.strip_prefix(letter)).ok_or_else(|| bad(what));
        let number = |letter, what| field(letter, what)?.parse().map_err(|_| bad(what));
        Ok(Self {
            root: field('C', "manifest without root catalog")?.parse()?,
            root_size: number('B', "manifest without catalog size")?,
            revision: number('S', "manifest without revision")?,
            fqrn: field('N', "manifest without name")?.to_owned(),
            certificate: field('X', "manifest without certificate")?.parse()?,
            history: field('H', "manifest without history")?.parse()?,
            published: number('T', "manifest without time")?,
        })
    }
}

/// Something published does not follow the format.
#[derive(Debug)]
pub struct Malformed {
    pub what: &'static str,
    pub found: String,
}

impl Display for Malformed {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "read the repository: {}: {:?}", self.what, self.found)
    }
}

impl std::error::Error for Malformed {}
