//! The memory, threads and open files of a process.

use std::fs;

use nix::unistd::Pid;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceUsage {
    /// Resident memory, in KiB.
    pub memory: usize,
    /// The most resident memory since the last `reset_peak`, in KiB.
    pub peak: usize,
    pub threads: usize,
    pub files: usize,
}

impl ResourceUsage {
    pub fn read(pid: Pid) -> Self {
        let (memory, peak) = (status_number(pid, "VmRSS"), status_number(pid, "VmHWM"));
        Self { memory, peak, threads: status_number(pid, "Threads"), files: count_open_files(pid) }
    }
}

/// A number of `/proc/<pid>/status`: `VmRSS` and `VmHWM` in KiB, `Threads`.
#[track_caller]
pub fn status_number(pid: Pid, field: &str) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process exists");
    let value = find_status_field(&status, field);
    let number = value.and_then(|value| value.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("{field} is a number in {status}"))
}

/// The value of a field in the text of `/proc/<pid>/status`.
pub fn find_status_field<'s>(status: &'s str, field: &str) -> Option<&'s str> {
    status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
}

pub fn count_open_files(pid: Pid) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("open files can be listed").count()
}

/// Makes the kernel count the peak of resident memory anew.
pub fn reset_peak(pid: Pid) {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("the peak can be reset");
}
