//! The published format, checked by programs of others.

#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::Command;

use cvmfs_testbed::format::{Kind, MANIFEST, Manifest, PathKey, WHITELIST};
use cvmfs_testbed::publisher::{Publisher, Settings};
use cvmfs_testbed::web::Web;
use flate2::read::ZlibDecoder;
use std::io::Read as _;

const FQRN: &str = "format.example.org";

fn openssl(arguments: &[&str], dir: &Path) -> Vec<u8> {
    let output = Command::new("openssl").args(arguments).current_dir(dir).output().expect("openssl is installed");
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Lines, hash and signature of a signed file.
fn parts(file: &[u8]) -> (&[u8], &[u8], &[u8]) {
    let end = file.windows(3).position(|window| window == b"--\n").expect("there is a separator");
    (&file[..end], &file[end + 3..end + 43], &file[end + 44..])
}

#[test]
fn manifest_and_whitelist_verify_with_openssl() {
    let dir = tempfile::tempdir().expect("there is a temporary directory");
    let (source, repository) = (dir.path().join("source"), dir.path().join("repository"));
    fs::create_dir(&source).expect("a directory can be made");
    fs::write(source.join("file"), "text").expect("a file can be written");
    let mut publisher = Publisher::create(&repository, FQRN, Settings::EVERYTHING);
    assert_eq!(publisher.publish(&source), 1);

    let file = fs::read(repository.join(MANIFEST)).expect("there is a manifest");
    let manifest = Manifest::parse(&file).expect("the manifest follows the format");
    assert_eq!((manifest.revision, manifest.fqrn.as_str()), (1, FQRN));
    let compressed = fs::read(repository.join(manifest.certificate.object_path(Kind::Certificate)));
    let mut certificate = Vec::new();
    ZlibDecoder::new(compressed.expect("the certificate is published").as_slice())
        .read_to_end(&mut certificate)
        .expect("the certificate is compressed");
    let (lines, hash, signature) = parts(&file);
    for (name, bytes) in [("crt", certificate.as_slice()), ("hash", hash), ("signature", signature), ("lines", lines)] {
        fs::write(dir.path().join(name), bytes).expect("a file can be written");
    }
    openssl(&["x509", "-in", "crt", "-noout", "-pubkey", "-out", "pub"], dir.path());
    openssl(&["dgst", "-sha1", "-verify", "pub", "-signature", "signature", "hash"], dir.path());
    assert!(openssl(&["dgst", "-sha1", "-r", "lines"], dir.path()).starts_with(hash));

    let whitelist = fs::read(repository.join(WHITELIST)).expect("there is a whitelist");
    let (lines, hash, signature) = parts(&whitelist);
    fs::write(dir.path().join("signature"), signature).expect("a file can be written");
    fs::write(dir.path().join("lines"), lines).expect("a file can be written");
    let public = publisher.public_key();
    let public = public.to_str().expect("the path is ASCII");
    // The padding is verified, and what it holds is the bare hash.
    let recover = ["pkeyutl", "-verifyrecover", "-pubin", "-inkey", public, "-in", "signature"];
    assert_eq!(openssl(&recover, dir.path()), hash);
    assert!(openssl(&["dgst", "-sha1", "-r", "lines"], dir.path()).starts_with(hash));
    let text = std::str::from_utf8(lines).expect("the whitelist is text");
    let print = openssl(&["x509", "-in", "crt", "-noout", "-fingerprint", "-sha1"], dir.path());
    let print = String::from_utf8(print).expect("openssl prints text");
    let (_, print) = print.trim().split_once('=').expect("openssl prints a fingerprint");
    assert_eq!(text.lines().nth(3), Some(print));
    assert_eq!(text.lines().nth(2), Some(format!("N{FQRN}").as_str()));
}

/// Values of another implementation (Python: `struct.unpack('<qq', md5(path))`).
#[test]
fn path_keys_are_little_endian_halves_of_the_md5() {
    assert_eq!(PathKey::of(b""), PathKey(338_333_539_836_370_388, 9_098_107_892_288_553_193));
    assert_eq!(PathKey::of(b"/hello/world"), PathKey(-5_970_313_431_342_009_229, 6_331_275_803_089_718_301));
}

#[test]
fn web_server_serves_only_files_and_stops_when_dropped() {
    let dir = tempfile::tempdir().expect("there is a temporary directory");
    fs::create_dir(dir.path().join("root")).expect("a directory can be made");
    fs::write(dir.path().join("root/file"), "text").expect("a file can be written");
    fs::write(dir.path().join("secret"), "secret").expect("a file can be written");
    let web = Web::start(&dir.path().join("root"));
    let url = web.url();
    let status = |path: &str| match ureq::get(format!("{url}{path}")).call() {
        Ok(mut response) => response.body_mut().read_to_string().map_err(|_| 0),
        Err(ureq::Error::StatusCode(code)) => Err(code),
        Err(_) => Err(0),
    };
    assert_eq!(status("/file"), Ok("text".to_owned()));
    assert_eq!(status("/missing"), Err(404));
    assert_eq!(status("/"), Err(404));
    assert_eq!(status("/../secret"), Err(404));
    let head = ureq::head(format!("{url}/file")).call().expect("HEAD is answered");
    assert_eq!(head.headers().get("content-length").map(ureq::http::HeaderValue::as_bytes), Some(&b"4"[..]));
    drop(web);
    assert_eq!(status("/file"), Err(0));
}
