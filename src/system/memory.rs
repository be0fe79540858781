//! How the C library's allocator behaves.
#![allow(unsafe_code)]

/// Arenas of glibc's allocator. By default it makes one for nearly every thread, and memory that was freed in one of
/// them is not used for others: with a thread for every call that waits for the disk, that was half of the daemon's
/// resident memory.
#[cfg(target_env = "gnu")]
const ARENAS: i32 = 2;

/// Allocations of this size and larger go back to the kernel when they are freed. By default glibc raises the limit with
/// each of them, up to 32 MiB, and keeps what large requests took.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD: i32 = 128 << 10;

/// Has the allocator keep little memory that is not used. To be called before threads start.
pub fn configure_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes two numbers and keeps no pointer. Invalid ones are refused.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, ARENAS);
        nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
    }
}

/// Gives free pages of the heap back to the kernel. By default the allocator gives back only those at its top.
pub fn give_back_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, and moves nothing that is in use.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
