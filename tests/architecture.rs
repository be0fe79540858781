//! Holds the code against the table of rooms in docs/design.md.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

type Uses = BTreeMap<String, BTreeSet<String>>;

/// Files that wire rooms together, or have access to all of them for tests.
const NO_ROOMS: [&str; 3] = ["lib", "main", "fuzz"];

#[test]
fn table_of_rooms_says_what_each_room_uses() {
    let (code, table) = (uses_in_code(), uses_in_table());
    let rooms = |uses: &Uses| uses.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(rooms(&code), rooms(&table), "rooms in src (left) and in docs/design.md (right)");
    for (room, used) in &code {
        assert_eq!(used, &table[room], "what src/{room} uses (left), and what docs/design.md says (right)");
    }
}

#[test]
fn rooms_use_each_other_in_no_circle() {
    let uses = uses_in_code();
    for room in uses.keys() {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&String> = uses[room].iter().collect();
        while let Some(used) = next.pop() {
            assert_ne!(used, room, "src/{room} is used by a room that it uses");
            if reached.insert(used) {
                next.extend(uses.get(used).into_iter().flatten());
            }
        }
    }
}

#[test]
fn room_names_are_found_in_each_form_of_a_path() {
    let code = "use crate::{a::{self, B}, c};\nuse crate::d::E;\nfn f() -> crate::g::H {}\n// crate::comment\n\
        #[cfg(test)]\nuse crate::double::D;\n#[cfg(test)]\nmod tests {\n    use crate::other;\n}\n";
    assert_eq!(rooms_named_in(code), ["a", "c", "d", "g"].map(str::to_owned).into());
}

fn uses_in_code() -> Uses {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut uses = Uses::new();
    for file in rust_files(&src) {
        let relative = file.strip_prefix(&src).unwrap().with_extension("");
        let parts: Vec<&str> = relative.iter().map(|part| part.to_str().unwrap()).collect();
        if parts.iter().any(|part| ["tests", "testing"].contains(part)) || NO_ROOMS.contains(&parts[0]) {
            continue;
        }
        let used = uses.entry(parts[0].to_owned()).or_default();
        used.extend(rooms_named_in(&fs::read_to_string(&file).unwrap()));
        used.remove(parts[0]);
    }
    uses
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The first names of all paths below `crate::`, without comments and code for tests.
fn rooms_named_in(code: &str) -> BTreeSet<String> {
    let mut production = String::new();
    let mut lines = code.lines();
    while let Some(line) = lines.next() {
        if line.trim() == "#[cfg(test)]" {
            let item = lines.by_ref().find(|line| !line.trim_start().starts_with("#[")).unwrap_or_default();
            if item.starts_with("mod ") && item.ends_with('{') {
                break;
            }
            continue;
        }
        production.push_str(line.split("//").next().unwrap());
        production.push('\n');
    }
    let mut rooms = BTreeSet::new();
    for path in production.split("crate::").skip(1) {
        match path.strip_prefix('{') {
            Some(group) => rooms.extend(names_in_group(group)),
            None => rooms.extend(first_name(path)),
        }
    }
    rooms
}

/// The first names in `a::{b, c}, d}`.
fn names_in_group(group: &str) -> Vec<String> {
    let mut depth = 0;
    let mut names = Vec::new();
    let mut is_first = true;
    for (index, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => is_first = true,
            _ if is_first && !character.is_whitespace() => {
                names.extend(first_name(&group[index..]));
                is_first = false;
            }
            _ => {}
        }
    }
    names
}

/// The name of a room at the beginning of a path. Names of types and macros are none.
fn first_name(path: &str) -> Option<String> {
    let name = path.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
    name.starts_with(|c: char| c.is_ascii_lowercase()).then(|| name.to_owned())
}

/// The columns "Room" and "Uses" of the table in docs/design.md.
fn uses_in_table() -> Uses {
    let design = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/design.md")).unwrap();
    let rows = design.lines().skip_while(|line| !line.starts_with("| Room |")).skip(2);
    let mut table = Uses::new();
    for row in rows.take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [room, _, used] = cells[..] else { panic!("a row has three cells: {row}") };
        let used = used.split(", ").filter(|name| *name != "–").map(str::to_owned).collect();
        table.insert(room.trim_matches('`').to_owned(), used);
    }
    table
}
