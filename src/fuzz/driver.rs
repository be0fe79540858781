//! Runs the targets for a bounded time with the corpus, with all inputs that ever made a target fail, and with random
//! mutations of both. `FUZZ_SECONDS` sets the time for each target and `FUZZ_SEED` the seed.

use std::fs;
use std::io::{self, Write};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::{TARGETS, Target};

const DEFAULT_SECONDS: u64 = 2;
const MAX_INPUT_BYTES: usize = 4096;

fn folder(kind: &str, target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz").join(kind).join(target.name)
}

/// The files of a folder, in the order of their names.
fn inputs(folder: &Path) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).into_iter().flatten().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn env_number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// A copy of a random input with up to six random changes.
fn mutate(random: &mut Rng, inputs: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
    let mut input = inputs[random.usize(..inputs.len())].clone();
    for _ in 0..random.usize(1..=6) {
        let start = random.usize(..=input.len());
        let end = start + random.usize(..=(input.len() - start).min(32));
        let word = words[random.usize(..words.len())];
        match random.u8(..8) {
            0 if start < input.len() => input[start] ^= 1 << random.u8(..8),
            1 if start < input.len() => input[start] = random.u8(..),
            2 => input.insert(start, random.u8(..)),
            3 => drop(input.drain(start..end)),
            4 => drop(input.splice(start..start, input[start..end].to_vec().repeat(random.usize(1..=8)))),
            5 => drop(input.splice(start..end, word.bytes())),
            6 => {
                let other = &inputs[random.usize(..inputs.len())];
                input.truncate(start);
                input.extend_from_slice(&other[random.usize(..=other.len())..]);
            }
            _ => drop(input.splice(start..start, word.bytes())),
        }
    }
    input.truncate(MAX_INPUT_BYTES);
    input
}

fn run(target: &Target, input: &[u8]) {
    if catch_unwind(|| (target.run)(input)).is_err() {
        let file = std::env::temp_dir().join(format!("fuzz-{}-{}", target.name, std::process::id()));
        fs::write(&file, input).unwrap();
        let (file, crashes) = (file.display(), folder("crashes", target));
        panic!("target {} failed on {file}: fix it, and move that file to {}", target.name, crashes.display());
    }
}

fn drive(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let words: Vec<&str> = target.dictionary.split(' ').collect();
    let mut known = inputs(&folder("corpus", target));
    assert!(!known.is_empty(), "{name} has no corpus");
    known.extend(inputs(&folder("crashes", target)));
    for input in &known {
        run(target, input);
    }
    let seed = env_number("FUZZ_SEED", 1);
    let mut random = Rng::with_seed(seed);
    let deadline = Instant::now() + Duration::from_secs(env_number("FUZZ_SECONDS", DEFAULT_SECONDS));
    let mut count = known.len();
    while Instant::now() < deadline {
        for _ in 0..64 {
            run(target, &mutate(&mut random, &known, &words));
        }
        count += 64;
    }
    // It writes to stderr itself, because the test harness hides what a successful test prints.
    let known = known.len();
    writeln!(io::stderr(), "fuzz: {name}: {count} inputs, {known} of them known, seed {seed}").unwrap();
}

macro_rules! fuzz_tests {
    ($($test:ident: $target:literal;)*) => {
        $(#[test]
        fn $test() {
            drive($target);
        })*

        #[test]
        fn each_target_has_a_test() {
            assert_eq!(TARGETS.map(|target| target.name), [$($target),*]);
        }
    };
}

fuzz_tests! {
    filters_match_what_they_quote: "filters";
    decoded_requests_keep_their_limits: "requests";
    parsed_digests_are_valid: "digest";
    image_references_lead_below_the_repository: "reference";
    parsed_manifests_keep_their_limits: "manifest";
    decoded_records_are_encoded_to_the_same: "records";
    loaded_configurations_keep_their_limits: "config";
    quoted_texts_are_short_and_printable: "quoted";
}
