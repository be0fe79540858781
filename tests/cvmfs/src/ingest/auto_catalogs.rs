//! Which directories of a layer get a catalog of their own (`CVMFS_AUTOCATALOGS=true`): from the
//! bottom up, while a directory has too many entries, its heaviest subdirectory becomes one.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// How many entries a catalog has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutoCatalogs {
    /// With more, a subdirectory becomes a catalog of its own (`CVMFS_AUTOCATALOGS_MAX_WEIGHT`).
    pub max_weight: usize,
    /// With fewer, a subdirectory never does (`CVMFS_AUTOCATALOGS_MIN_WEIGHT`).
    pub min_weight: usize,
}

/// The subdirectories of a directory in the order in which they were added, and how many other
/// entries it has.
#[derive(Default)]
struct Directory<'a> {
    subdirectories: Vec<&'a Path>,
    others: usize,
}

impl AutoCatalogs {
    /// Chooses from what was `added` below `base`: paths, and whether each is a directory.
    pub fn choose(&self, base: &Path, added: &[(PathBuf, bool)]) -> Vec<PathBuf> {
        let mut directories: HashMap<&Path, Directory> = HashMap::new();
        for (path, is_directory) in added.iter().filter(|(path, _)| path != base && path.starts_with(base)) {
            let parent = directories.entry(path.parent().expect("what is below has a parent")).or_default();
            if *is_directory {
                parent.subdirectories.push(path);
            } else {
                parent.others += 1;
            }
        }
        let mut chosen = Vec::new();
        self.weigh(base, &directories, &mut chosen);
        chosen
    }

    /// The entries that the catalog of the directory `path` has because of it.
    fn weigh(&self, path: &Path, all: &HashMap<&Path, Directory>, chosen: &mut Vec<PathBuf>) -> usize {
        let Some(directory) = all.get(path) else { return 1 };
        let mut weights: Vec<(&Path, usize)> =
            directory.subdirectories.iter().map(|&below| (below, self.weigh(below, all, chosen))).collect();
        loop {
            let weight = 1 + directory.others + weights.iter().map(|(_, weight)| weight).sum::<usize>();
            // The publisher takes the first of several directories that have equally many entries.
            let heaviest = weights.iter_mut().rev().max_by_key(|(_, weight)| *weight);
            match heaviest {
                Some((below, heavy)) if weight > self.max_weight && *heavy >= self.min_weight.max(2) => {
                    chosen.push(below.to_owned());
                    *heavy = 1;
                }
                _ => return weight,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with so many files.
    fn full(path: &str, files: usize) -> Vec<(PathBuf, bool)> {
        let file = |n: usize| (Path::new(path).join(n.to_string()), false);
        [(PathBuf::from(path), true)].into_iter().chain((0..files).map(file)).collect()
    }

    #[test]
    fn heaviest_subdirectories_become_catalogs_until_the_rest_is_small_enough() {
        let limits = AutoCatalogs { max_weight: 100, min_weight: 10 };
        let choose = |parts: &[Vec<(PathBuf, bool)>]| limits.choose(Path::new("l"), &parts.concat());
        assert_eq!(choose(&[full("l", 200)]), Vec::<PathBuf>::new(), "nothing but files");
        assert_eq!(choose(&[full("l", 50), full("l/a", 48)]), Vec::<PathBuf>::new(), "100 entries");
        assert_eq!(choose(&[full("l", 50), full("l/a", 49)]), [Path::new("l/a")]);
        let many = [full("l", 95), full("l/light", 8), full("l/b", 20), full("l/a", 20), full("l/c", 30)];
        assert_eq!(choose(&many), ["l/c", "l/b", "l/a"].map(Path::new), "one too light stays");
        // A subdirectory is divided before its parent is weighed.
        let deep = [full("l", 1), full("l/a", 60), full("l/a/b", 60)];
        assert_eq!(choose(&deep), [Path::new("l/a/b")]);
    }
}
