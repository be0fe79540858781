//! Tries what a service may want to do, and prints for each whether it was allowed. Run twice,
//! with and without the restrictions of a unit, it shows what they are worth.

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

type Tried = std::io::Result<()>;

fn main() {
    let dir = std::env::args_os().nth(1).expect("a directory to try things in");
    let at = |name: &str| Path::new(&dir).join(name);
    // What the daemon does.
    tell("bind", bind(&at("bound")));
    tell("whiteout", node(&at("whiteout"), SFlag::S_IFCHR, 0, 0));
    tell("skeleton", skeleton(&at("skeleton")));
    tell("opaque", xattr::set(at("skeleton"), "trusted.overlay.opaque", b"y"));
    tell("listen", UnixListener::bind(at("socket")).map(drop));
    tell("datagram", UnixDatagram::unbound().map(drop));
    // What it never does.
    tell("disk", node(&at("disk"), SFlag::S_IFBLK, 7, 0));
    tell("fuse", node(&at("fuse"), SFlag::S_IFCHR, 10, 229).and_then(|()| File::open(at("fuse")).map(drop)));
    tell("internet", family(AddressFamily::Inet, SockType::Stream));
    tell("internet-6", family(AddressFamily::Inet6, SockType::Stream));
    tell("netlink", family(AddressFamily::Netlink, SockType::Raw));
    tell("packet", family(AddressFamily::Packet, SockType::Raw));
    tell("hostname", gethostname().and_then(|name| sethostname(&name)).map_err(Into::into));
    tell("personality", personality::set(Persona::ADDR_NO_RANDOMIZE).map(drop).map_err(Into::into));
    // Unlike attaching, this does not stop the other.
    tell("trace", ptrace::seize(Pid::from_raw(1), ptrace::Options::empty()).map_err(Into::into));
    tell("host-name-namespace", unshare(CloneFlags::CLONE_NEWUTS).map_err(Into::into));
    tell("mount-namespace", unshare(CloneFlags::CLONE_NEWNS).map_err(Into::into));
    tell("chroot", chroot("/").map_err(Into::into));
    tell("program", Command::new("/bin/true").status().map(drop));
    tell("group", setgid(Gid::from_raw(65_534)).map_err(Into::into));
    tell("user", setuid(Uid::from_raw(65_534)).map_err(Into::into));
}

fn tell(what: &str, tried: Tried) {
    match tried {
        Ok(()) => println!("{what}: ok"),
        Err(e) => println!("{what}: {:?}", Errno::from_raw(e.raw_os_error().unwrap_or(0))),
    }
}

fn bind(at: &Path) -> Tried {
    fs::create_dir(at)?;
    mount(Some("/usr"), at, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(umount2(at, MntFlags::UMOUNT_NOFOLLOW)?)
}

fn node(at: &Path, kind: SFlag, major: u64, minor: u64) -> Tried {
    Ok(mknod(at, kind, Mode::S_IRUSR, makedev(major, minor))?)
}

/// A directory of somebody else, with the setgid bit.
fn skeleton(at: &Path) -> Tried {
    fs::create_dir(at)?;
    chown(at, Some(1000), Some(1001))?;
    fs::set_permissions(at, fs::Permissions::from_mode(0o2775))?;
    let mode = fs::metadata(at)?.permissions().mode();
    if mode & 0o7777 == 0o2775 { Ok(()) } else { Err(Errno::EPERM.into()) }
}

fn family(family: AddressFamily, kind: SockType) -> Tried {
    Ok(socket(family, kind, SockFlag::empty(), None).map(drop)?)
}
