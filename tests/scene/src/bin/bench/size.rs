//! The programs on disk, as they were built.

use std::fs;
use std::path::Path;

use scene::process::{run as run_program, tool};
use scene::sandbox::Sandbox;
use scene::snapshotter::binary;

use crate::Say;
use crate::contestant::{GO, OURS};
use crate::report::{Group, Unit};
use crate::settings::Settings;
use crate::stats::{Cell, float};

pub fn run(sandbox: &Sandbox, _: &Settings, _: &Say) -> Group {
    let mut group = Group::new("Size of the program", &[OURS, GO]);
    for (name, path) in [(OURS, binary()), (GO, tool("gopeer"))] {
        let bare = sandbox.path("bare");
        let arguments = [path.as_os_str(), "-o".as_ref(), bare.as_os_str()];
        let stripped = run_program("strip", arguments).status.success();
        group.put("without symbols", Unit::Megabytes, name, bytes(&bare).filter(|_| stripped));
        group.put("as it was built", Unit::Megabytes, name, bytes(&path));
    }
    group.add_note(format!("{GO}: the engine alone, without what the snapshotter puts around it"));
    group
}

fn bytes(path: &Path) -> Option<Cell> {
    let length = fs::metadata(path).ok()?.len();
    Cell::one(float(usize::try_from(length).ok()?))
}
