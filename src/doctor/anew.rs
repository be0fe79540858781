//! Commands that remove images and pull them again: first all of them are removed, because one that stays
//! keeps the layers that it shares, and then what is wrong with those stays as well.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::migration::rebuild::DEFAULT_NAME as NAME;
use crate::model::{shell_quote, shell_quote_all};

/// containerd's namespace of Kubernetes.
pub const KUBERNETES: &str = "k8s.io";

/// Of namespaces of containerd, and references in them.
pub fn pull_anew<'i>(images: impl Iterator<Item = (&'i str, &'i str)>) -> String {
    let mut by_namespace: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (namespace, reference) in images {
        by_namespace.entry(namespace).or_default().push(reference);
    }
    let of_one = |(namespace, references): (&str, Vec<&str>)| {
        let program = if namespace == KUBERNETES {
            "crictl".to_owned()
        } else {
            format!("nerdctl --namespace {} --snapshotter {NAME}", shell_quote(namespace))
        };
        let remove = format!("{program} rmi {}", shell_quote_all(references.iter().copied()));
        let pulls = references.iter().map(|reference| format!("{program} pull {}", shell_quote_all([*reference])));
        [remove].into_iter().chain(pulls).collect::<Vec<_>>().join(" && ")
    };
    by_namespace.into_iter().map(of_one).collect::<Vec<_>>().join(" && ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_removed_before_one_is_pulled() {
        let all = [(KUBERNETES, "r/a:1"), ("my space", "r/b:1"), (KUBERNETES, "r/it's")];
        let nerdctl = "nerdctl --namespace 'my space' --snapshotter cvmfs-snapshotter";
        let quoted = r"'r/it'\''s'";
        assert_eq!(
            pull_anew(all.into_iter()),
            format!(
                "crictl rmi r/a:1 {quoted} && crictl pull r/a:1 && crictl pull {quoted} && \
                 {nerdctl} rmi r/b:1 && {nerdctl} pull r/b:1"
            )
        );
    }

    /// Whoever tags an image chooses its name.
    #[test]
    fn a_reference_is_no_option() {
        assert_eq!(
            pull_anew([(KUBERNETES, "--all"), (KUBERNETES, "r/a:1")].into_iter()),
            "crictl rmi -- --all r/a:1 && crictl pull -- --all && crictl pull r/a:1"
        );
    }
}
