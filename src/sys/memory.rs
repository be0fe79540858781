//! How the C library's allocator behaves.
#![allow(unsafe_code)]

/// Arenas of glibc's allocator. By itself it makes one for nearly every thread, and memory that was
/// freed in one of them serves nobody else: with a thread for every call that waits for the
/// disk, that was half of the daemon.
#[cfg(target_env = "gnu")]
const ARENAS: i32 = 2;

/// Pieces of so many bytes or more go back to the kernel when they are freed. By itself glibc takes a larger number
/// after each such piece, up to 32 MiB, and keeps what large requests took.
#[cfg(target_env = "gnu")]
const RETURNED_BYTES: i32 = 128 << 10;

/// Has the process keep little memory that it does not use. To be called before threads start.
pub fn configure_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes two numbers and keeps no pointer. One that it does not like it refuses.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, ARENAS);
        nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, RETURNED_BYTES);
    }
}

/// Gives the kernel the pages that are free within the heap. By itself the allocator gives back only what is free at
/// its end.
pub fn give_back_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, and moves nothing that is in use.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
