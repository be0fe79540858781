//! The labels of snapshots that mean something to containerd or to us, and their bounds.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

/// The labels of a snapshot, by name.
pub type Labels = BTreeMap<String, String>;

/// The label by which containerd asks for a published layer. Its value is the chain id, which names the layer together
/// with all layers below it.
pub const LABEL_SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// The digest of the layer's compressed blob, as the image manifest names it.
pub const LABEL_LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
/// The reference of the image that is being pulled.
pub const LABEL_IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// Name and value of the label that marks remote snapshots. The stargz family of snapshotters sets the same one.
pub const LABEL_REMOTE: (&str, &str) = ("containerd.io/snapshot/remote", "remote snapshot");
/// Where container uids start on the host: `container:host:length[,…]`.
pub const LABEL_UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// Where container gids start on the host: `container:host:length[,…]`.
pub const LABEL_GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// Maximum size of all labels of a snapshot together, in bytes. containerd allows 4096 for one label; a snapshot
/// must always fit into a message of a List.
pub const MAX_LABELS_BYTES: usize = 1 << 20;

/// Maximum number of labels of a snapshot. containerd sets some dozens at most.
pub const MAX_LABELS: usize = 1024;

/// Size of all names and values together, in bytes.
pub fn labels_size(labels: &Labels) -> usize {
    labels.iter().map(|(name, value)| name.len() + value.len()).sum()
}
