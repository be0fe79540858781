//! The one CRI call that the scene makes, from its `.proto` file, without `protoc`.

fn main() {
    println!("cargo:rerun-if-changed=proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/cri.proto")
        .cargo_out_dir("proto")
        .run_from_script();
}
