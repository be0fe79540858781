//! Comparison of two root file systems in everything that a program can see.

use std::path::Path;

pub use cvmfs_testbed::listing::Difference;
use cvmfs_testbed::listing::Listing;

pub struct Comparison {
    pub entries: usize,
    /// The size of the content that was compared.
    pub bytes: u64,
    pub differences: Vec<Difference>,
}

/// Compares the tree below `actual` with the one below `expected`.
pub fn compare(expected: &Path, actual: &Path) -> Comparison {
    let (expected, actual) = (read(expected), read(actual));
    let differences = expected.compare(&actual);
    Comparison { entries: expected.entries.len(), bytes: expected.bytes(), differences }
}

fn read(top: &Path) -> Listing {
    let mut listing = Listing::read(top);
    // The time of the top directory is that of the pull, so it differs between any two pulls.
    for property in ["mtime", "nanoseconds"] {
        listing.entries.get_mut(Path::new(".")).expect("a tree has a top").remove(property);
    }
    listing
}
