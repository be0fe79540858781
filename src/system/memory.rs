//! Settings of the C library's allocator.
#![allow(unsafe_code)]

/// Maximum number of arenas of glibc's allocator. By default it makes one for nearly every thread, and memory that was freed in one of
/// them is not used for others: with a thread for every call that waits for the disk, that was half of the daemon's
/// resident memory.
#[cfg(target_env = "gnu")]
const MAX_ARENAS: i32 = 2;

/// Allocations of this size and larger go back to the kernel when they are freed. By default glibc raises this limit with
/// each such allocation, up to 32 MiB, and then keeps the memory of large requests.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD: i32 = 128 << 10;

/// Makes the allocator keep little unused memory. It must be called before threads start.
pub fn configure_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers, keeps no pointer, and refuses invalid values.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, MAX_ARENAS);
        nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
    }
}

/// Returns free pages of the heap to the kernel. By default the allocator returns only those at the top of the heap.
pub fn give_back_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number and does not touch memory that is in use.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
