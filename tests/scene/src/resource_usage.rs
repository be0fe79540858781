//! What a process takes: memory, threads, open files.

use std::fs;

use nix::unistd::Pid;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Resident, in KiB.
    pub memory: usize,
    /// The most since the last `forget_peak`.
    pub peak: usize,
    pub threads: usize,
    pub files: usize,
}

impl Footprint {
    pub fn of(pid: Pid) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let number = line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse().ok());
            number.unwrap_or_else(|| panic!("the status has no {name}"))
        };
        let files = fs::read_dir(format!("/proc/{pid}/fd")).expect("open files can be listed").count();
        Self { memory: number("VmRSS"), peak: number("VmHWM"), threads: number("Threads"), files }
    }
}

pub fn forget_peak(pid: Pid) {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("the peak can be forgotten");
}
