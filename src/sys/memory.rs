//! How the C library's allocator behaves.
#![allow(unsafe_code)]

/// Of glibc's allocator. By itself it makes one for nearly every thread, and memory that was
/// freed in one of them serves nobody else: with a thread for every call that waits for the
/// disk, that was half of the daemon. To be called before threads start.
#[cfg(target_env = "gnu")]
const ARENAS: i32 = 2;

pub fn share_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes two numbers and keeps no pointer. One that it does not like it refuses.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, ARENAS);
    }
}
