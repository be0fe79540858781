//! A remedy of the doctor for containerd's configuration, followed as somebody does who knows nothing
//! but what it says: each phrase does one thing to the named file, and one that is not known
//! here fails the test.

use std::fs;
use std::path::Path;

const END: &str = "then systemctl restart containerd";
const ADD_IT: &str = " (add it if it is not there)";

/// `files`: those that a remedy may name.
#[track_caller]
pub fn follow(remedy: &str, files: &[&Path]) {
    let steps = remedy.strip_suffix(END).unwrap_or_else(|| panic!("this does not end with {END:?}: {remedy}"));
    let steps = steps.trim_end_matches([' ', ',', '\n']);
    let begins = |line: &&str| ["in ", "add to ", "as the first line of "].iter().any(|word| line.starts_with(word));
    let mut lines = steps.lines().peekable();
    while let Some(line) = lines.next() {
        let mut block = Vec::new();
        while let Some(line) = lines.next_if(|line| !begins(line)) {
            block.push(line);
        }
        let (word, file, rest) = place(line, files).unwrap_or_else(|| panic!("of no file: {line:?} of {remedy}"));
        let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("cannot read {}: {e}", file.display()));
        let text = match word {
            "in " => inside(text, rest, &block),
            "add to " if rest == ":" => Some(format!("{}\n{}\n", text.trim_end(), block.join("\n"))),
            "as the first line of " => rest.strip_prefix(": ").map(|line| format!("{line}\n{text}")),
            _ => None,
        };
        let text = text.unwrap_or_else(|| panic!("this is not known or not possible: {line:?} of {remedy}"));
        fs::write(file, text).expect("a file can be written");
    }
}

/// The first word of a step, its file, and what stands behind that.
fn place<'l, 'f>(line: &'l str, files: &[&'f Path]) -> Option<(&'static str, &'f Path, &'l str)> {
    let words = ["in ", "add to ", "as the first line of "];
    let (word, rest) = words.iter().find_map(|&word| Some((word, line.strip_prefix(word)?)))?;
    files.iter().find_map(|&file| Some((word, file, rest.strip_prefix(file.to_str()?)?)))
}

/// What is to be done inside a file.
fn inside(text: String, what: &str, block: &[&str]) -> Option<String> {
    if let Some((table, rest)) = what.split_once(", inside the braces of ") {
        let (name, entries) = rest.split_once(": ")?;
        return into_braces(&text, table.strip_prefix(", table ")?, name, entries);
    }
    if let Some(rest) = what.strip_prefix(", table ") {
        let (which, line) = match rest.split_once(&format!("{ADD_IT}:")) {
            Some(parts) => parts,
            None => rest.split_at(rest.find("]:")? + 1),
        };
        let mut text = text;
        if !text.lines().any(|line| line.trim() == which) {
            if !rest.contains(ADD_IT) {
                return None;
            }
            text = format!("{}\n{which}\n", text.trim_end());
        }
        let line = line.trim_start_matches(':').trim();
        let lines: Vec<&str> = if line.is_empty() { block.to_vec() } else { vec![line] };
        return lines.into_iter().try_fold(text, |text, line| set(&text, which, None, line.trim()));
    }
    if !block.is_empty() {
        return None;
    }
    if let Some(line) = what.strip_prefix(", above all tables: ") {
        let end = text.lines().take_while(|line| !line.trim_start().starts_with('[')).count();
        let mut lines: Vec<&str> = text.lines().collect();
        let n = lines[..end].iter().position(|one| key(one) == key(line))?;
        // A list may go on for some lines.
        let last = n + lines[n..].iter().position(|line| line.contains(']'))?;
        lines.splice(n..=last, [line]);
        return Some(lines.join("\n") + "\n");
    }
    if let Some(rest) = what.strip_prefix(", in ") {
        let (which, rest) = rest.split_once(" with ")?;
        let (with, line) = rest.split_once(": ")?;
        return set(&text, which, Some(with), line);
    }
    if let Some(rest) = what.strip_prefix(", add to the list ") {
        let (key, rest) = rest.split_once(" of ")?;
        let (table, entry) = rest.split_once(": ")?;
        return into_list(&text, table, key, |all| format!("{entry}, {all}"));
    }
    let rest = what.strip_prefix(": ")?;
    if let Some(heading) = rest.strip_prefix("remove the table ") {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let range = tables(&lines, heading).into_iter().next()?;
        lines.drain(range.start - 1..range.end);
        return Some(lines.join("\n") + "\n");
    }
    if let Some(rest) = rest.strip_prefix("remove ") {
        let (value, rest) = rest.split_once(" from ")?;
        let (key, table) = rest.split_once(" of ")?;
        return into_list(&text, table, key, |all| {
            all.split(',').map(str::trim).filter(|one| *one != value).collect::<Vec<_>>().join(", ")
        });
    }
    // Replacements, of which none makes what the next one replaces.
    rest.split(", ").try_fold(text, |text, pair| {
        let (new, old) = pair.split_once(" instead of ")?;
        text.contains(old).then(|| text.replace(old, new))
    })
}

/// The lines of each table with this heading, without it.
fn tables(lines: &[String], heading: &str) -> Vec<std::ops::Range<usize>> {
    let begins = lines.iter().enumerate().filter(|(_, line)| line.trim() == heading).map(|(n, _)| n + 1);
    let end = |from: usize| {
        let ends = lines[from..].iter().position(|line| line.trim_start().starts_with('['));
        ends.map_or(lines.len(), |length| from + length)
    };
    begins.map(|from| from..end(from)).collect()
}

fn key(line: &str) -> &str {
    line.split('=').next().unwrap_or_default().trim().trim_matches('"')
}

/// A key of a table, of the one that has the line `with`, gets the value of `line`.
fn set(text: &str, heading: &str, with: Option<&str>, line: &str) -> Option<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let all = tables(&lines, heading);
    let is_it = |range: &std::ops::Range<usize>| {
        with.is_none_or(|with| lines[range.clone()].iter().any(|line| line.trim() == with))
    };
    let meant: Vec<_> = all.into_iter().filter(is_it).collect();
    if meant.is_empty() || with.is_none() && meant.len() > 1 {
        return None;
    }
    // From the end, where lines keep their numbers.
    for range in meant.into_iter().rev() {
        match lines[range.clone()].iter().position(|one| key(one) == key(line)) {
            Some(n) => line.clone_into(&mut lines[range.start + n]),
            None => lines.insert(range.start, line.to_owned()),
        }
    }
    Some(lines.join("\n") + "\n")
}

/// A table in braces, on one line, whose values have no commas.
fn into_braces(text: &str, heading: &str, name: &str, entries: &str) -> Option<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let range = tables(&lines, heading).into_iter().next()?;
    let line = lines[range].iter_mut().find(|line| key(line) == name)?;
    let (before, rest) = line.split_once('{')?;
    let mut all: Vec<&str> = rest.trim_end().strip_suffix('}')?.split(',').map(str::trim).collect();
    for entry in entries.split(", ") {
        all.retain(|one| !one.is_empty() && key(one) != key(entry));
        all.push(entry);
    }
    *line = format!("{before}{{ {} }}", all.join(", "));
    Some(lines.join("\n") + "\n")
}

/// A list that stands on one line.
fn into_list(text: &str, heading: &str, name: &str, change: impl Fn(&str) -> String) -> Option<String> {
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let range = tables(&lines, heading).into_iter().next()?;
    let line = lines[range].iter().find(|line| key(line) == name)?;
    let (before, rest) = line.split_once('[')?;
    let (all, after) = rest.rsplit_once(']')?;
    Some(text.replace(line.as_str(), &format!("{before}[{}]{after}", change(all))))
}
