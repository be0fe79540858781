//! Writes what packages make of the command line: shell completions, under the names that the
//! shells look for, and the manual pages in `docs/`.
//!
//!     pages completions FOLDER
//!     pages manual docs
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use cvmfs_snapshotter::cli;

const PROGRAM: &str = "cvmfs-snapshotter";
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];
/// As their pages are called.
const COMMANDS: [&str; 3] = ["cvmfs-snapshotter-status", "cvmfs-snapshotter-doctor", "cvmfs-snapshotter-gc"];
const MANUAL: &str = "System Administration";
/// What options and commands do not say: written by hand, between and behind what they say.
const DESCRIPTION: &str = include_str!("../sections/description");
const REST: &str = include_str!("../sections/rest");

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let done = match arguments.as_slice() {
        [what, folder] if what == Path::new("completions") => completions(folder),
        [what, folder] if what == Path::new("manual") => {
            manual().and_then(|pages| pages.into_iter().try_for_each(|(name, text)| fs::write(folder.join(name), text)))
        }
        _ => {
            eprintln!("usage: pages completions|manual FOLDER");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("pages: cannot write: {e}");
            ExitCode::FAILURE
        }
    }
}

fn completions(folder: &Path) -> io::Result<()> {
    SHELLS.into_iter().try_for_each(|shell| generate_to(shell, &mut cli::command(), PROGRAM, folder).map(drop))
}

/// The manual pages by the names of their files: one of the daemon, and one of each command.
fn manual() -> io::Result<Vec<(String, Vec<u8>)>> {
    let source = format!("{PROGRAM} {}", env!("CARGO_PKG_VERSION"));
    let mut command = cli::command().disable_help_subcommand(true);
    // Gives commands the options that all have.
    command.build();
    let mut pages = Vec::new();
    for name in COMMANDS {
        let of_command = command.find_subcommand(name.trim_start_matches("cvmfs-snapshotter-"));
        let of_command = of_command.expect("the program has the command").clone();
        let page = Man::new(of_command.name(name).display_name(name).disable_help_flag(true));
        let page = page.section("8").date("").source(&source).manual(MANUAL);
        let mut text = Vec::new();
        page.render_title(&mut text)?;
        page.render_name_section(&mut text)?;
        page.render_synopsis_section(&mut text)?;
        page.render_description_section(&mut text)?;
        page.render_options_section(&mut text)?;
        text.extend_from_slice(b".SH SEE ALSO\n.BR cvmfs-snapshotter (8)\n");
        pages.push((format!("{name}.8"), text));
    }
    let page = Man::new(command).section("8").date("").source(&source).manual(MANUAL);
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    text.extend_from_slice(DESCRIPTION.as_bytes());
    page.render_options_section(&mut text)?;
    text.extend_from_slice(b".PP\nOptions may be written with one dash or two.\n");
    page.render_subcommands_section(&mut text)?;
    text.extend_from_slice(REST.as_bytes());
    pages.push((format!("{PROGRAM}.8"), text));
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_pages_say_what_the_program_takes() {
        for (name, text) in manual().unwrap() {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(&name);
            let there = fs::read(&path).unwrap_or_default();
            let is_same = there == text;
            assert!(is_same, "docs/{name} is not what the program's options make of it: run make manual");
        }
    }

    /// They offered what is for the program itself, and hidden from `--help`.
    #[test]
    fn shells_complete_the_commands_that_have_a_page_and_no_other() {
        for shell in SHELLS {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut cli::command(), PROGRAM, &mut script);
            let script = String::from_utf8(script).unwrap();
            for name in ["status", "doctor", "gc"] {
                assert!(script.contains(name), "{shell}: {name}");
            }
            assert!(!script.contains("probe"), "{shell}: {script}");
        }
    }

    #[test]
    fn each_command_has_a_page() {
        let command = cli::command();
        let names: Vec<String> = command.get_subcommands().map(|one| one.get_name().to_owned()).collect();
        assert_eq!(names, COMMANDS.map(|name| name.trim_start_matches("cvmfs-snapshotter-")));
    }

    #[test]
    fn the_manual_explains_every_key_of_the_configuration() {
        let file = include_str!("../../config.toml");
        let keys = file.lines().filter_map(|line| line.strip_prefix('#')?.split_once(" = ")).map(|(key, _)| key);
        for key in keys.filter(|key| key.chars().all(|c| c.is_ascii_lowercase() || c == '-')) {
            assert!(REST.contains(&format!("\n.B {key}\n")), "{key} is not in the manual");
        }
    }
}
