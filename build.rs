//! Turns the `.proto` files into Rust with the pure-Rust parser: no `protoc` is needed.

fn main() {
    println!("cargo:rerun-if-changed=proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/mount.proto")
        .input("proto/snapshots.proto")
        .input("proto/record.proto")
        .cargo_out_dir("proto")
        .run_from_script();
}
