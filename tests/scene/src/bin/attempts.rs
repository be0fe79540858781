//! Tries operations that a service might do, and prints whether each was allowed. A run with the restrictions of a unit
//! and one without show the effect of the restrictions.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::personality::{self, Persona};
use nix::sys::ptrace;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{Gid, Pid, Uid, chroot, gethostname, setgid, sethostname, setuid};

type Outcome = std::io::Result<()>;

fn main() {
    let dir = std::env::args_os().nth(1).expect("a directory to try things in");
    let at = |name: &str| Path::new(&dir).join(name);
    // The daemon does these.
    print_outcome("bind", bind(&at("bound")));
    print_outcome("whiteout", node(&at("whiteout"), SFlag::S_IFCHR, 0, 0));
    print_outcome("skeleton", skeleton(&at("skeleton")));
    print_outcome("opaque", xattr::set(at("skeleton"), "trusted.overlay.opaque", b"y"));
    print_outcome("listen", UnixListener::bind(at("socket")).map(drop));
    print_outcome("datagram", UnixDatagram::unbound().map(drop));
    // The daemon never does these.
    print_outcome("disk", node(&at("disk"), SFlag::S_IFBLK, 7, 0));
    print_outcome("fuse", node(&at("fuse"), SFlag::S_IFCHR, 10, 229).and_then(|()| File::open(at("fuse")).map(drop)));
    print_outcome("internet", family(AddressFamily::Inet, SockType::Stream));
    print_outcome("internet-6", family(AddressFamily::Inet6, SockType::Stream));
    print_outcome("netlink", family(AddressFamily::Netlink, SockType::Raw));
    print_outcome("packet", family(AddressFamily::Packet, SockType::Raw));
    print_outcome("hostname", gethostname().and_then(|name| sethostname(&name)).map_err(Into::into));
    print_outcome("personality", personality::set(Persona::ADDR_NO_RANDOMIZE).map(drop).map_err(Into::into));
    // Seizing a process, unlike attaching to it, does not stop it.
    print_outcome("trace", ptrace::seize(Pid::from_raw(1), ptrace::Options::empty()).map_err(Into::into));
    print_outcome("host-name-namespace", unshare(CloneFlags::CLONE_NEWUTS).map_err(Into::into));
    print_outcome("mount-namespace", unshare(CloneFlags::CLONE_NEWNS).map_err(Into::into));
    print_outcome("chroot", chroot("/").map_err(Into::into));
    print_outcome("program", Command::new("/bin/true").status().map(drop));
    print_outcome("group", setgid(Gid::from_raw(65_534)).map_err(Into::into));
    print_outcome("user", setuid(Uid::from_raw(65_534)).map_err(Into::into));
}

fn print_outcome(operation: &str, outcome: Outcome) {
    match outcome {
        Ok(()) => println!("{operation}: ok"),
        Err(e) => println!("{operation}: {:?}", Errno::from_raw(e.raw_os_error().unwrap_or(0))),
    }
}

fn bind(at: &Path) -> Outcome {
    fs::create_dir(at)?;
    mount(Some("/usr"), at, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(umount2(at, MntFlags::UMOUNT_NOFOLLOW)?)
}

fn node(at: &Path, kind: SFlag, major: u64, minor: u64) -> Outcome {
    Ok(mknod(at, kind, Mode::S_IRUSR, makedev(major, minor))?)
}

/// A directory of somebody else, with the setgid bit.
fn skeleton(at: &Path) -> Outcome {
    fs::create_dir(at)?;
    chown(at, Some(1000), Some(1001))?;
    fs::set_permissions(at, fs::Permissions::from_mode(0o2775))?;
    let mode = fs::metadata(at)?.permissions().mode();
    if mode & 0o7777 == 0o2775 { Ok(()) } else { Err(Errno::EPERM.into()) }
}

fn family(family: AddressFamily, kind: SockType) -> Outcome {
    Ok(socket(family, kind, SockFlag::empty(), None).map(drop)?)
}
