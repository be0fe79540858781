//! The repository's keys and what they sign, by the program `openssl`: the Rust crate for RSA has
//! an open advisory, and OpenSSL is what the real publisher uses.
//!
//! The master key signs the whitelist, which names the certificate; the certificate's key signs
//! the manifest.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::format::{Digest, Manifest};

const WHITELIST_LIFE: u64 = 30 * DAY;
const DAY: u64 = 86_400;

#[derive(Debug)]
pub struct Keys {
    dir: TempDir,
}

impl Keys {
    pub fn create(fqrn: &str) -> Self {
        let keys = Self { dir: tempfile::tempdir().expect("the temporary directory takes the keys") };
        let path = |name| keys.dir.path().join(name).into_os_string();
        let (master, public) = (path("master.key"), keys.public_key().into_os_string());
        let (key, certificate) = (path("repository.key"), path("repository.crt"));
        let subject = format!("/CN={fqrn} CernVM-FS Release Managers");
        openssl(&["genrsa".as_ref(), "-out".as_ref(), &master, "2048".as_ref()], b"");
        openssl(&["rsa".as_ref(), "-in".as_ref(), &master, "-pubout".as_ref(), "-out".as_ref(), &public], b"");
        let request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256", "-days", "3650", "-subj", &subject];
        let mut request: Vec<&OsStr> = request.iter().map(OsStr::new).collect();
        request.extend([OsStr::new("-keyout"), &key, OsStr::new("-out"), &certificate]);
        openssl(&request, b"");
        keys
    }

    pub fn public_key(&self) -> PathBuf {
        self.dir.path().join("master.pub")
    }

    /// PEM, as it is published.
    pub fn certificate(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("repository.crt")).expect("the certificate was just written")
    }

    /// The manifest's file: its lines, their hash, and the signature of the hash.
    pub fn manifest(&self, manifest: &Manifest) -> Vec<u8> {
        let key = self.dir.path().join("repository.key");
        signed(&manifest.lines(), |hash| {
            openssl(&["dgst".as_ref(), "-sha1".as_ref(), "-sign".as_ref(), key.as_os_str()], hash)
        })
    }

    /// The whitelist's file, valid for 30 days.
    pub fn whitelist(&self, fqrn: &str, now: u64) -> Vec<u8> {
        let certificate = self.dir.path().join("repository.crt");
        let print = ["x509", "-noout", "-fingerprint", "-sha1", "-in"];
        let mut print: Vec<&OsStr> = print.iter().map(OsStr::new).collect();
        print.push(certificate.as_os_str());
        let print = String::from_utf8(openssl(&print, b"")).expect("openssl prints a fingerprint in ASCII");
        let (_, fingerprint) = print.trim().split_once('=').expect("openssl prints `sha1 Fingerprint=…`");
        let lines = format!("{}\nE{}\nN{fqrn}\n{fingerprint}\n", timestamp(now), timestamp(now + WHITELIST_LIFE));
        let key = self.dir.path().join("master.key");
        // The bare hash is signed, PKCS#1 v1.5 type 1, without the usual DigestInfo around it.
        let sign = ["pkeyutl", "-sign", "-pkeyopt", "rsa_padding_mode:pkcs1", "-inkey"];
        let mut sign: Vec<&OsStr> = sign.iter().map(OsStr::new).collect();
        sign.push(key.as_os_str());
        signed(&lines, |hash| openssl(&sign, hash))
    }
}

fn signed(lines: &str, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> Vec<u8> {
    let hash = Digest::of(lines.as_bytes()).to_string();
    let signature = sign(hash.as_bytes());
    [lines.as_bytes(), b"--\n", hash.as_bytes(), b"\n", &signature].concat()
}

/// Runs openssl with `input`; returns what it prints.
fn openssl(arguments: &[&OsStr], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program openssl is there (Debian package openssl)");
    // A command that reads nothing may have ended already.
    let _ = child.stdin.take().expect("the input is a pipe").write_all(input);
    let output = child.wait_with_output().expect("openssl can be waited for");
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// `YYYYMMDDhhmmss` in UTC.
fn timestamp(seconds: u64) -> String {
    // Years that begin in March put the leap day at their end; 719,468 days lie between the first
    // of them and 1970.
    let days = seconds / DAY + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let second = seconds % DAY;
    format!("{year:04}{month:02}{day:02}{:02}{:02}{:02}", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::timestamp;

    #[test]
    fn timestamps_handle_leap_years_and_centuries() {
        assert_eq!(timestamp(0), "19700101000000");
        assert_eq!(timestamp(951_782_399), "20000228235959");
        assert_eq!(timestamp(951_782_400), "20000229000000");
        assert_eq!(timestamp(1_709_251_199), "20240229235959");
        assert_eq!(timestamp(4_107_542_400), "21000301000000");
    }
}
