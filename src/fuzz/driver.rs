//! Throws the corpus, every input that ever crashed a target, and random changes of both at the
//! targets, for a bounded time. `FUZZ_SECONDS` for each target and `FUZZ_SEED` change the run.

use std::fs;
use std::io::{self, Write};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{TARGETS, Target};

const SECONDS: u64 = 2;
const LONGEST: usize = 4096;

fn folder(kind: &str, target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz").join(kind).join(target.name)
}

/// The files of a folder, in the order of their names.
fn inputs(folder: &Path) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).into_iter().flatten().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

/// A small generator of numbers; the same seed gives the same run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

/// One random change, or a few, of an input.
fn mutated(random: &mut Random, seeds: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
    let mut input = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(6) {
        let at = random.below(input.len() + 1);
        let end = at + random.below((input.len() - at).min(32) + 1);
        match random.below(8) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = random.byte(),
            2 => input.insert(at, random.byte()),
            3 => drop(input.drain(at..end)),
            4 => drop(input.splice(at..at, input[at..end].to_vec().repeat(1 + random.below(8)))),
            5 => drop(input.splice(at..end, words[random.below(words.len())].bytes())),
            6 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => drop(input.splice(at..at, words[random.below(words.len())].bytes())),
        }
    }
    input.truncate(LONGEST);
    input
}

fn try_on(target: &Target, input: &[u8]) {
    if catch_unwind(|| (target.run)(input)).is_err() {
        let file = std::env::temp_dir().join(format!("fuzz-{}-{}", target.name, std::process::id()));
        fs::write(&file, input).unwrap();
        let (file, crashes) = (file.display(), folder("crashes", target));
        panic!("{} broke a promise on {file}: mend it, and move that file to {}", target.name, crashes.display());
    }
}

fn drive(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let mut seeds = inputs(&folder("corpus", target));
    assert!(!seeds.is_empty(), "{name} has no corpus");
    seeds.extend(inputs(&folder("crashes", target)));
    for seed in &seeds {
        try_on(target, seed);
    }
    let seed = number("FUZZ_SEED", 1);
    let mut random = Random(seed);
    let until = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS", SECONDS));
    let mut count = seeds.len();
    while Instant::now() < until {
        for _ in 0..64 {
            try_on(target, &mutated(&mut random, &seeds, target.words));
        }
        count += 64;
    }
    // Past the harness, which keeps to itself what a test that succeeds prints.
    let known = seeds.len();
    writeln!(io::stderr(), "fuzz: {name}: {count} inputs, {known} of them known, seed {seed}").unwrap();
}

macro_rules! fuzzed {
    ($($test:ident: $target:literal;)*) => {
        $(#[test]
        fn $test() {
            drive($target);
        })*

        #[test]
        fn every_target_is_driven() {
            assert_eq!(TARGETS.map(|target| target.name), [$($target),*]);
        }
    };
}

fuzzed! {
    no_filter_breaks_the_filter_language: "filters";
    no_request_breaks_the_decoding: "requests";
    no_text_passes_for_a_digest_that_is_none: "digest";
    no_reference_becomes_a_path_that_leads_elsewhere: "reference";
    no_manifest_breaks_the_parser: "manifest";
    no_row_breaks_the_records: "records";
    no_file_breaks_the_configuration: "config";
    no_text_breaks_a_message: "quoted";
}
