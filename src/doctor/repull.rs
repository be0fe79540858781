//! Commands that remove images and pull them again. All images are removed before one is pulled: an image that stays keeps
//! the layers it shares, and with them what is wrong with those.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::migration::rebuild::DEFAULT_NAME as NAME;
use crate::model::{shell_quote, shell_quote_all};

/// The namespace that Kubernetes uses in containerd.
pub const KUBERNETES: &str = "k8s.io";

/// One line for a shell, which repulls these images: pairs of a namespace of containerd and a reference in it.
pub fn repull_command<'i>(images: impl Iterator<Item = (&'i str, &'i str)>) -> String {
    let mut by_namespace: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (namespace, reference) in images {
        by_namespace.entry(namespace).or_default().push(reference);
    }
    let mut commands = Vec::new();
    for (namespace, references) in by_namespace {
        let program = if namespace == KUBERNETES {
            "crictl".to_owned()
        } else {
            format!("nerdctl --namespace {} --snapshotter {NAME}", shell_quote(namespace))
        };
        commands.push(format!("{program} rmi {}", shell_quote_all(references.iter().copied())));
        for reference in references {
            commands.push(format!("{program} pull {}", shell_quote_all([reference])));
        }
    }
    commands.join(" && ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_images_of_a_namespace_are_removed_before_one_is_pulled() {
        let images = [(KUBERNETES, "r/a:1"), ("my space", "r/b:1"), (KUBERNETES, "r/it's")];
        let expected = r"crictl rmi r/a:1 'r/it'\''s' && crictl pull r/a:1 && crictl pull 'r/it'\''s' && nerdctl --namespace 'my space' --snapshotter cvmfs-snapshotter rmi r/b:1 && nerdctl --namespace 'my space' --snapshotter cvmfs-snapshotter pull r/b:1";
        assert_eq!(repull_command(images.into_iter()), expected);
    }

    /// Whoever tags an image chooses its name.
    #[test]
    fn reference_that_begins_with_a_dash_is_not_taken_for_an_option() {
        let images = [(KUBERNETES, "--all"), (KUBERNETES, "r/a:1")];
        let expected = "crictl rmi -- --all r/a:1 && crictl pull -- --all && crictl pull r/a:1";
        assert_eq!(repull_command(images.into_iter()), expected);
    }
}
