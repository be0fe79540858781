//! Turns the `.proto` files into Rust with the pure-Rust parser: no `protoc` is needed. And has the
//! C++ library of gRPC's C core linked into the program, where the compiler has it to link.

use std::env::{var, var_os};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=build.rs");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/mount.proto")
        .input("proto/snapshots.proto")
        .input("proto/record.proto")
        .input("proto/admin.proto")
        .input("proto/health.proto")
        .input("proto/containerd.proto")
        .cargo_out_dir("proto")
        .run_from_script();
    link_statically("libstdc++.a");
}

/// The linker takes the shared library where it finds both: so it looks into a directory first that
/// has the other one only. The program then uses 1 MB less, and runs where there is no such library.
fn link_statically(library: &str) {
    let target = var("TARGET").unwrap_or_default().replace('-', "_");
    let of_target = format!("CXX_{target}");
    println!("cargo:rerun-if-env-changed={of_target}");
    println!("cargo:rerun-if-env-changed=CXX");
    if var_os("CARGO_FEATURE_SERVER").is_none() || var("TARGET") != var("HOST") {
        return;
    }
    let compiler = var_os(of_target).or_else(|| var_os("CXX")).unwrap_or_else(|| "c++".into());
    // It says the bare name if it has no such file, and other compilers say other things. Zig's, which links
    // a library of its own, names this machine's, and fails.
    let said = Command::new(compiler).arg(format!("-print-file-name={library}")).output();
    let said = said.ok().filter(|said| said.status.success()).map(|said| said.stdout).unwrap_or_default();
    let found = PathBuf::from(String::from_utf8_lossy(&said).trim());
    if !found.is_absolute() || !found.is_file() {
        return;
    }
    let directory = PathBuf::from(var_os("OUT_DIR").unwrap_or_default()).join("static");
    let link = directory.join(library);
    let _ = std::fs::create_dir_all(&directory);
    let _ = std::fs::remove_file(&link);
    if symlink(found, link).is_ok() {
        println!("cargo:rustc-link-search=native={}", directory.display());
    }
}
