//! Reads files of bbolt, the embedded store of Go programs: the Go snapshotter's metadata and
//! containerd's own.
//!
//! Works on bytes and knows nothing of what they mean to anybody. A file is input: whatever is
//! in it, nothing here panics, recurses or goes round in circles, and no more is kept than
//! references into the bytes. Each page belongs to one bucket and is read once.
#![forbid(unsafe_code)]

pub mod file;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fmt;

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;
const PAGE_HEADER: usize = 16;
const ELEMENT: usize = 16;
const BUCKET_HEADER: usize = 16;
const META: usize = 64;
/// Up to where the checksum of a meta page goes.
const META_SUMMED: usize = 56;
const BRANCH: u16 = 1;
const LEAF: u16 = 2;
/// In a leaf: the value is a bucket.
const IS_BUCKET: u32 = 1;
/// Page sizes of the machines that bbolt runs on.
const PAGE_SIZES: [usize; 8] = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// Neither of the two meta pages is one; what is wrong with the first.
    NoMeta {
        bytes: usize,
        first: InvalidMeta,
    },
    /// The file ends before its last page.
    Truncated {
        bytes: usize,
        needs: u64,
    },
    Page {
        page: u64,
        corruption: Corruption,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidMeta {
    TooShort,
    Magic(u32),
    Version(u32),
    PageSize(u32),
    Checksum { stored: u64, computed: u64 },
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Corruption {
    /// The number is that of a meta page, or above the last one.
    Outside { pages: u64 },
    /// It says that it is another one.
    Number(u64),
    /// Neither branch nor leaf.
    Type(u16),
    /// It has more overflow pages than there are.
    Overflow(u32),
    /// An entry lies outside of the page.
    Entry { number: usize },
    /// Two places name the page: a loop, or a page of two buckets.
    Twice,
    /// The keys do not ascend.
    Order { number: usize },
}

impl fmt::Display for InvalidMeta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort => f.write_str("it is too short"),
            Self::Magic(found) => write!(f, "it begins with {found:#010x} instead of {MAGIC:#010x}"),
            Self::Version(found) => write!(f, "its format has version {found}, known is {VERSION}"),
            Self::PageSize(found) => write!(f, "its page size is {found}"),
            Self::Checksum { stored, computed } => {
                write!(f, "its checksum is {stored:#018x} and should be {computed:#018x}")
            }
        }
    }
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside { pages } => write!(f, "there is no such page among {pages}"),
            Self::Number(found) => write!(f, "it says that it is page {found}"),
            Self::Type(found) => write!(f, "it is of type {found:#x}, neither branch nor leaf"),
            Self::Overflow(found) => write!(f, "its {found} overflow pages go beyond the last page"),
            Self::Entry { number } => write!(f, "entry {number} lies outside of it"),
            Self::Twice => f.write_str("more than one place names it"),
            Self::Order { number } => write!(f, "entry {number} is out of order"),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMeta { bytes, first } => {
                write!(f, "no bbolt file: of {bytes} bytes, neither meta page is valid; the first: {first}")
            }
            Self::Truncated { bytes, needs } => write!(f, "the file has {bytes} bytes, its pages need {needs}"),
            Self::Page { page, corruption } => write!(f, "page {page} is damaged: {corruption}"),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

/// The bytes of a file, and where its newest transaction begins.
pub struct Database<'b> {
    bytes: &'b [u8],
    page_size: usize,
    /// So many pages are in use or were.
    pages: u64,
    root: u64,
    read: RefCell<HashSet<u64>>,
}

/// A bucket that was not looked into yet. It can be read once.
#[derive(Debug)]
pub struct Bucket<'b> {
    root: BucketRoot<'b>,
    /// The last number that the bucket gave out.
    pub sequence: u64,
}

#[derive(Debug)]
enum BucketRoot<'b> {
    Page(u64),
    /// A small bucket lies in a value of the one that it is in, in this page.
    Inline {
        bytes: &'b [u8],
        within: u64,
    },
}

#[derive(Debug)]
pub enum Entry<'b> {
    Value(&'b [u8]),
    Bucket(Bucket<'b>),
}

/// What is in a bucket, by key.
pub type Entries<'b> = BTreeMap<&'b [u8], Entry<'b>>;

struct Meta {
    page_size: usize,
    root: u64,
    pages: u64,
    transaction: u64,
}

impl<'b> Database<'b> {
    pub fn parse(bytes: &'b [u8]) -> Result<Self> {
        let first = meta_at(bytes, 0);
        // Where the second page begins, the first one says. If it is damaged, bbolt tries what
        // there can be.
        let second = match &first {
            Ok(meta) => meta_at(bytes, meta.page_size).ok(),
            Err(_) => {
                PAGE_SIZES.into_iter().find_map(|size| meta_at(bytes, size).ok().filter(|meta| meta.page_size == size))
            }
        };
        let meta = match (first, second) {
            (Ok(first), Some(second)) if second.transaction > first.transaction => second,
            (Ok(first), _) => first,
            (Err(_), Some(second)) => second,
            (Err(first), None) => return Err(Error::NoMeta { bytes: bytes.len(), first }),
        };
        let needs = meta.pages.saturating_mul(meta.page_size as u64);
        if needs > bytes.len() as u64 {
            return Err(Error::Truncated { bytes: bytes.len(), needs });
        }
        let Meta { page_size, pages, root, .. } = meta;
        Ok(Self { bytes, page_size, pages, root, read: RefCell::default() })
    }

    /// The bucket that all others are in.
    pub fn root(&self) -> Bucket<'b> {
        Bucket { root: BucketRoot::Page(self.root), sequence: 0 }
    }

    pub fn read(&self, bucket: &Bucket<'b>) -> Result<Entries<'b>> {
        let mut entries = Entries::new();
        let mut unread = match bucket.root {
            BucketRoot::Inline { bytes, within } => {
                let page = Page { number: within, bytes };
                if page.kind()? != LEAF {
                    return Err(page.corruption(Corruption::Type(page.kind()?)));
                }
                page.leaf(&mut entries)?;
                return Ok(entries);
            }
            BucketRoot::Page(number) => vec![number],
        };
        while let Some(number) = unread.pop() {
            let page = self.page(number)?;
            match page.kind()? {
                BRANCH => {
                    // Read from the last to the first, so pushed from the first: keys ascend.
                    let at = unread.len();
                    page.branch(&mut unread)?;
                    unread[at..].reverse();
                }
                LEAF => page.leaf(&mut entries)?,
                other => return Err(page.corruption(Corruption::Type(other))),
            }
        }
        Ok(entries)
    }

    /// Reads the bucket `name` in `entries`; nothing is in one that is not there.
    pub fn read_in(&self, entries: &mut Entries<'b>, name: &[u8]) -> Result<Entries<'b>> {
        match entries.remove(name) {
            Some(Entry::Bucket(bucket)) => self.read(&bucket),
            _ => Ok(Entries::new()),
        }
    }

    /// A page with its overflow.
    fn page(&self, number: u64) -> Result<Page<'b>> {
        let corruption = |corruption| Error::Page { page: number, corruption };
        let outside = corruption(Corruption::Outside { pages: self.pages });
        if number < 2 || number >= self.pages {
            return Err(outside);
        }
        if !self.read.borrow_mut().insert(number) {
            return Err(corruption(Corruption::Twice));
        }
        let at = usize::try_from(number).ok().and_then(|n| n.checked_mul(self.page_size));
        let Some(bytes) = at.and_then(|at| self.bytes.get(at..)) else { return Err(outside) };
        let (Some(own), Some(overflow)) = (u64_at(bytes, 0), u32_at(bytes, 12)) else { return Err(outside) };
        if own != number {
            return Err(corruption(Corruption::Number(own)));
        }
        if u64::from(overflow) >= self.pages - number {
            return Err(corruption(Corruption::Overflow(overflow)));
        }
        let length = (overflow as usize + 1).saturating_mul(self.page_size);
        let bytes = bytes.get(..length).ok_or_else(|| corruption(Corruption::Overflow(overflow)))?;
        Ok(Page { number, bytes })
    }
}

struct Page<'b> {
    number: u64,
    bytes: &'b [u8],
}

impl<'b> Page<'b> {
    fn corruption(&self, corruption: Corruption) -> Error {
        Error::Page { page: self.number, corruption }
    }

    fn kind(&self) -> Result<u16> {
        u16_at(self.bytes, 8).ok_or_else(|| self.corruption(Corruption::Entry { number: 0 }))
    }

    /// The offset of every element of the page.
    fn elements(&self) -> Result<impl Iterator<Item = (usize, usize)> + use<>> {
        let count = u16_at(self.bytes, 10).ok_or_else(|| self.corruption(Corruption::Entry { number: 0 }))?;
        Ok((0..usize::from(count)).map(|number| (number, PAGE_HEADER + number * ELEMENT)))
    }

    fn branch(&self, children: &mut Vec<u64>) -> Result<()> {
        for (number, at) in self.elements()? {
            let child = u64_at(self.bytes, at + 8).ok_or_else(|| self.corruption(Corruption::Entry { number }))?;
            children.push(child);
        }
        Ok(())
    }

    fn leaf(&self, entries: &mut Entries<'b>) -> Result<()> {
        for (number, at) in self.elements()? {
            let bad = || self.corruption(Corruption::Entry { number });
            let field = |n: usize| u32_at(self.bytes, at + 4 * n);
            let (Some(flags), Some(position), Some(key), Some(value)) = (field(0), field(1), field(2), field(3)) else {
                return Err(bad());
            };
            let rest = at.checked_add(position as usize).and_then(|from| self.bytes.get(from..)).ok_or_else(bad)?;
            let (key, rest) = rest.split_at_checked(key as usize).ok_or_else(bad)?;
            let value = rest.get(..value as usize).ok_or_else(bad)?;
            let entry =
                if flags & IS_BUCKET == 0 { Entry::Value(value) } else { self.bucket(value).ok_or_else(bad)? };
            if entries.last_key_value().is_some_and(|(last, _)| *last >= key) {
                return Err(self.corruption(Corruption::Order { number }));
            }
            entries.insert(key, entry);
        }
        Ok(())
    }

    fn bucket(&self, value: &'b [u8]) -> Option<Entry<'b>> {
        let (root, sequence) = (u64_at(value, 0)?, u64_at(value, 8)?);
        let root = match root {
            0 => BucketRoot::Inline { bytes: value.get(BUCKET_HEADER..)?, within: self.number },
            page => BucketRoot::Page(page),
        };
        Some(Entry::Bucket(Bucket { root, sequence }))
    }
}

fn meta_at(bytes: &[u8], page: usize) -> std::result::Result<Meta, InvalidMeta> {
    let bytes = page.checked_add(PAGE_HEADER).and_then(|from| bytes.get(from..)?.get(..META));
    let bytes = bytes.ok_or(InvalidMeta::TooShort)?;
    let short = |at| u32_at(bytes, at).ok_or(InvalidMeta::TooShort);
    let long = |at| u64_at(bytes, at).ok_or(InvalidMeta::TooShort);
    let (magic, version, page_size) = (short(0)?, short(4)?, short(8)?);
    if magic != MAGIC {
        return Err(InvalidMeta::Magic(magic));
    }
    if version != VERSION {
        return Err(InvalidMeta::Version(version));
    }
    let (stored, computed) = (long(META_SUMMED)?, fnv_64a(&bytes[..META_SUMMED]));
    if stored != computed {
        return Err(InvalidMeta::Checksum { stored, computed });
    }
    let size = PAGE_SIZES.into_iter().find(|size| *size == page_size as usize);
    let page_size = size.ok_or(InvalidMeta::PageSize(page_size))?;
    Ok(Meta { page_size, root: long(16)?, pages: long(40)?, transaction: long(48)? })
}

fn fnv_64a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Numbers are in the byte order of the machine that wrote the file, which is this one.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array_at(bytes, at).map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests;
