//! Reads files of bbolt, the embedded store of Go programs: the Go snapshotter's metadata and containerd's own.
//!
//! It turns bytes into buckets and does not know what is in them. A file is input: whatever its content, nothing here
//! panics, recurses or loops for ever, and memory is taken only for references into the bytes. A page belongs to one
//! bucket and is read once.
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
/// Number of bytes of a meta page that its checksum covers.
const META_CHECKSUMMED: usize = 56;
const BRANCH: u16 = 1;
const LEAF: u16 = 2;
/// Flag of an element of a leaf whose value is a bucket.
const IS_BUCKET: u32 = 1;
/// Page sizes of the machines on which bbolt runs.
const PAGE_SIZES: [usize; 8] = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// Neither meta page is valid.
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

/// The damage of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Corruption {
    /// The number belongs to a meta page, or is above the last one.
    OutOfRange { pages: u64 },
    /// The page has another number than its position.
    Number(u64),
    /// It is neither a branch nor a leaf.
    Type(u16),
    /// Its overflow pages go beyond the last page.
    Overflow(u32),
    /// An entry lies outside the page.
    Entry { number: usize },
    /// The page is referred to twice: the pages form a circle, or two buckets share it.
    Shared,
    /// The keys do not ascend.
    Order { number: usize },
}

impl fmt::Display for InvalidMeta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort => f.write_str("it is too short"),
            Self::Magic(magic) => write!(f, "it begins with {magic:#010x} instead of {MAGIC:#010x}"),
            Self::Version(version) => write!(f, "its format version is {version} instead of {VERSION}"),
            Self::PageSize(size) => write!(f, "its page size is {size}"),
            Self::Checksum { stored, computed } => {
                write!(f, "its checksum is {stored:#018x} instead of {computed:#018x}")
            }
        }
    }
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfRange { pages } => write!(f, "there is no such page among {pages}"),
            Self::Number(number) => write!(f, "it has the number {number}"),
            Self::Type(kind) => write!(f, "its type {kind:#x} is neither branch nor leaf"),
            Self::Overflow(count) => write!(f, "its {count} overflow pages go beyond the last page"),
            Self::Entry { number } => write!(f, "entry {number} lies outside of it"),
            Self::Shared => f.write_str("it is referred to more than once"),
            Self::Order { number } => write!(f, "entry {number} is out of order"),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMeta { bytes, first } => {
                write!(f, "no bbolt file of {bytes} bytes: neither meta page is valid; the first: {first}")
            }
            Self::Truncated { bytes, needs } => write!(f, "the file has {bytes} bytes, its pages need {needs}"),
            Self::Page { page, corruption } => write!(f, "page {page} is damaged: {corruption}"),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

/// The content of a file as of its newest transaction.
pub struct Database<'b> {
    bytes: &'b [u8],
    page_size: usize,
    /// Number of pages, free ones included.
    pages: u64,
    /// The page of the root bucket.
    root: u64,
    pages_read: RefCell<HashSet<u64>>,
}

/// A bucket that was not read yet. It can be read once.
#[derive(Debug)]
pub struct Bucket<'b> {
    root: BucketRoot<'b>,
    /// The last number of the bucket's sequence.
    pub sequence: u64,
}

#[derive(Debug)]
enum BucketRoot<'b> {
    Page(u64),
    /// A small bucket is stored in a value of its parent, which is in this page.
    Inline {
        bytes: &'b [u8],
        page: u64,
    },
}

#[derive(Debug)]
pub enum Entry<'b> {
    Value(&'b [u8]),
    Bucket(Bucket<'b>),
}

/// The content of a bucket by key.
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
        // The first meta page holds the page size and so the position of the second. If it is damaged, bbolt tries all
        // page sizes.
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
        Ok(Self { bytes, page_size, pages, root, pages_read: RefCell::default() })
    }

    /// The bucket that contains all others.
    pub fn root(&self) -> Bucket<'b> {
        Bucket { root: BucketRoot::Page(self.root), sequence: 0 }
    }

    pub fn read(&self, bucket: &Bucket<'b>) -> Result<Entries<'b>> {
        let mut entries = Entries::new();
        let mut unread = match bucket.root {
            BucketRoot::Inline { bytes, page } => {
                let page = Page { number: page, bytes };
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
                    // The last page is popped first, so the children are reversed: their keys ascend.
                    let first_child = unread.len();
                    page.branch(&mut unread)?;
                    unread[first_child..].reverse();
                }
                LEAF => page.leaf(&mut entries)?,
                other => return Err(page.corruption(Corruption::Type(other))),
            }
        }
        Ok(entries)
    }

    /// Removes the bucket `name` from `entries` and reads it. A missing bucket is empty.
    pub fn read_child(&self, entries: &mut Entries<'b>, name: &[u8]) -> Result<Entries<'b>> {
        match entries.remove(name) {
            Some(Entry::Bucket(bucket)) => self.read(&bucket),
            _ => Ok(Entries::new()),
        }
    }

    /// A page with its overflow pages.
    fn page(&self, number: u64) -> Result<Page<'b>> {
        let corruption = |corruption| Error::Page { page: number, corruption };
        let out_of_range = corruption(Corruption::OutOfRange { pages: self.pages });
        if number < 2 || number >= self.pages {
            return Err(out_of_range);
        }
        if !self.pages_read.borrow_mut().insert(number) {
            return Err(corruption(Corruption::Shared));
        }
        let offset = usize::try_from(number).ok().and_then(|n| n.checked_mul(self.page_size));
        let Some(bytes) = offset.and_then(|offset| self.bytes.get(offset..)) else { return Err(out_of_range) };
        let (Some(stored), Some(overflow)) = (u64_at(bytes, 0), u32_at(bytes, 12)) else { return Err(out_of_range) };
        if stored != number {
            return Err(corruption(Corruption::Number(stored)));
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

    /// The number and the offset of each element of the page.
    fn elements(&self) -> Result<impl Iterator<Item = (usize, usize)> + use<>> {
        let count = u16_at(self.bytes, 10).ok_or_else(|| self.corruption(Corruption::Entry { number: 0 }))?;
        Ok((0..usize::from(count)).map(|number| (number, PAGE_HEADER + number * ELEMENT)))
    }

    fn branch(&self, children: &mut Vec<u64>) -> Result<()> {
        for (number, offset) in self.elements()? {
            let child = u64_at(self.bytes, offset + 8).ok_or_else(|| self.corruption(Corruption::Entry { number }))?;
            children.push(child);
        }
        Ok(())
    }

    fn leaf(&self, entries: &mut Entries<'b>) -> Result<()> {
        for (number, offset) in self.elements()? {
            let invalid = || self.corruption(Corruption::Entry { number });
            let field = |n: usize| u32_at(self.bytes, offset + 4 * n);
            let (Some(flags), Some(position), Some(key), Some(value)) = (field(0), field(1), field(2), field(3)) else {
                return Err(invalid());
            };
            let rest =
                offset.checked_add(position as usize).and_then(|start| self.bytes.get(start..)).ok_or_else(invalid)?;
            let (key, rest) = rest.split_at_checked(key as usize).ok_or_else(invalid)?;
            let value = rest.get(..value as usize).ok_or_else(invalid)?;
            let entry =
                if flags & IS_BUCKET == 0 { Entry::Value(value) } else { self.bucket(value).ok_or_else(invalid)? };
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
            0 => BucketRoot::Inline { bytes: value.get(BUCKET_HEADER..)?, page: self.number },
            page => BucketRoot::Page(page),
        };
        Some(Entry::Bucket(Bucket { root, sequence }))
    }
}

fn meta_at(bytes: &[u8], page: usize) -> std::result::Result<Meta, InvalidMeta> {
    let bytes = page.checked_add(PAGE_HEADER).and_then(|start| bytes.get(start..)?.get(..META));
    let bytes = bytes.ok_or(InvalidMeta::TooShort)?;
    let u32_field = |offset| u32_at(bytes, offset).ok_or(InvalidMeta::TooShort);
    let u64_field = |offset| u64_at(bytes, offset).ok_or(InvalidMeta::TooShort);
    let (magic, version, page_size) = (u32_field(0)?, u32_field(4)?, u32_field(8)?);
    if magic != MAGIC {
        return Err(InvalidMeta::Magic(magic));
    }
    if version != VERSION {
        return Err(InvalidMeta::Version(version));
    }
    let (stored, computed) = (u64_field(META_CHECKSUMMED)?, fnv_64a(&bytes[..META_CHECKSUMMED]));
    if stored != computed {
        return Err(InvalidMeta::Checksum { stored, computed });
    }
    let size = PAGE_SIZES.into_iter().find(|size| *size == page_size as usize);
    let page_size = size.ok_or(InvalidMeta::PageSize(page_size))?;
    Ok(Meta { page_size, root: u64_field(16)?, pages: u64_field(40)?, transaction: u64_field(48)? })
}

fn fnv_64a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

// Numbers are in the byte order of the machine that wrote the file, which is this one.

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array_at(bytes, offset).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array_at(bytes, offset).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    array_at(bytes, offset).map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests;
