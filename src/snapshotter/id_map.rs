//! The labels that say to which ids of the host a container's ids are mapped.
#![forbid(unsafe_code)]

use super::{Error, Result};
use crate::model::{LABEL_GID_MAPPING, LABEL_UID_MAPPING, Labels, Owner};

/// The user and the group of the host to which the labels map the container's root. None if there is no such label.
pub(crate) fn mapped_root(labels: &Labels) -> Result<Option<Owner>> {
    let uid = host_id_in_label(labels, LABEL_UID_MAPPING)?;
    let gid = host_id_in_label(labels, LABEL_GID_MAPPING)?;
    Ok(match (uid, gid) {
        (None, None) => None,
        (uid, gid) => Some(Owner { uid: uid.unwrap_or(0), gid: gid.unwrap_or(0) }),
    })
}

fn host_id_in_label(labels: &Labels, label: &'static str) -> Result<Option<u32>> {
    let Some(mapping) = labels.get(label) else { return Ok(None) };
    match host_id_of_root(mapping) {
        Some(id) => Ok(Some(id)),
        None => Err(Error::InvalidMapping { label, value: mapping.clone() }),
    }
}

/// The host id of container id 0 in a mapping `container:host:length[,…]`. None if the mapping is malformed, or no range
/// of it holds container id 0.
fn host_id_of_root(mapping: &str) -> Option<u32> {
    let mut root = None;
    for range in mapping.split(',') {
        let numbers: Vec<u32> = range.split(':').map(|number| number.parse().ok()).collect::<Option<_>>()?;
        let [container, host, length] = numbers[..] else { return None };
        host.checked_add(length)?;
        if container == 0 && length > 0 {
            root.get_or_insert(host);
        }
    }
    root
}
