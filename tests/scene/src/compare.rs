//! Compares two root file systems in everything a program can see.

use std::path::Path;

pub use cvmfs_testbed::listing::Difference;
use cvmfs_testbed::listing::Listing;

pub struct Comparison {
    pub entries: usize,
    /// Of content that was compared.
    pub bytes: u64,
    pub differences: Vec<Difference>,
}

/// Says what is different in the tree below `found`.
pub fn compare(expected: &Path, found: &Path) -> Comparison {
    let (expected, found) = (read(expected), read(found));
    let differences = expected.compare(&found);
    Comparison { entries: expected.entries.len(), bytes: expected.bytes(), differences }
}

fn read(top: &Path) -> Listing {
    let mut listing = Listing::read(top);
    // At the top it is when containerd unpacked the image, and differs between any two pulls.
    for property in ["mtime", "nanoseconds"] {
        listing.entries.get_mut(Path::new(".")).expect("a tree has a top").remove(property);
    }
    listing
}
