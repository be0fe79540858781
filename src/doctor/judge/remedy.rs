//! The words of remedies. An admin follows them by copy and paste: each step names the file, the table
//! as it is written there and the whole line, and two remedies followed one after the other
//! write no table and no key twice, which TOML refuses.
#![forbid(unsafe_code)]

use super::Case;
use crate::doctor::configuration::{CRI_TABLES, Inner};

/// What makes containerd read its configuration.
pub const RESTART: &str = "systemctl restart containerd";

/// The steps, and what makes them count.
pub fn remedy(steps: &[String]) -> String {
    match steps {
        [one] if !one.contains('\n') => format!("{one}, then {RESTART}"),
        all => format!("{}\nthen {RESTART}", all.join("\n")),
    }
}

/// `[plugins.'io.containerd.cri.v1.images']`: quoted as the pages of that version of containerd do.
pub fn heading(table: &[&str]) -> String {
    format!("[{}]", path(table))
}

fn path(table: &[&str]) -> String {
    let is_bare = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
    let quoted = |name: &&str| match *name {
        name if is_bare(name) => name.to_owned(),
        name if name == CRI_TABLES[0] || name.contains('\'') => format!("{name:?}"),
        name => format!("'{name}'"),
    };
    table.iter().map(quoted).collect::<Vec<_>>().join(".")
}

impl Case<'_> {
    /// The file in which the word on a plugin counts.
    pub fn home(&self, table: &[&str]) -> String {
        self.name(self.found.home(table).unwrap_or(0))
    }

    fn name(&self, file: usize) -> String {
        match file {
            0 => self.file.to_owned(),
            imported => self.found.files[imported].display().to_string(),
        }
    }

    /// A key that belongs to no table gets this list.
    pub fn list(&self, file: usize, key: &str, names: &[impl AsRef<str>]) -> String {
        let names: Vec<String> = names.iter().map(|name| format!("\"{}\"", name.as_ref())).collect();
        format!("in {}, above all tables: {key} = [{}]", self.name(file), names.join(", "))
    }

    /// Keys of one table get values, whether they are there or not.
    pub fn set(&self, table: &[&str], lines: &[String]) -> String {
        if let Some(inner) = self.found.inner(table) {
            return self.set_inside(table, inner, lines);
        }
        let add = if self.found.stands(table) { "" } else { " (add it if it is not there)" };
        let which = format!("in {}, table {}{add}:", self.home(table), heading(table));
        match lines {
            [one] => format!("{which} {one}"),
            all => format!("{which}\n  {}", all.join("\n  ")),
        }
    }

    fn set_inside(&self, table: &[&str], inner: Inner, lines: &[String]) -> String {
        let above = if inner.heading == 0 {
            "above all tables".to_owned()
        } else {
            format!("table {}", heading(&table[..inner.heading]))
        };
        let keys = &table[inner.braces..];
        let dotted = |line: &String| if keys.is_empty() { line.clone() } else { format!("{}.{line}", path(keys)) };
        let lines: Vec<String> = lines.iter().map(dotted).collect();
        let which = format!("in {}, {above}", self.home(table));
        if inner.braces > inner.heading {
            let braces = path(&table[inner.heading..inner.braces]);
            return format!("{which}, inside the braces of {braces}: {}", lines.join(", "));
        }
        match &lines[..] {
            [one] => format!("{which}: {one}"),
            all => format!("{which}:\n  {}", all.join("\n  ")),
        }
    }

    /// Whole tables, after all others.
    pub fn add(&self, table: &[&str], text: &str) -> String {
        format!("add to {}:\n{text}", self.home(table))
    }

    /// Each of these texts in place of another one, wherever that stands.
    pub fn replace(&self, table: &[&str], pairs: &[(String, String)]) -> String {
        let pairs: Vec<String> = pairs.iter().map(|(new, old)| format!("{new} instead of {old}")).collect();
        format!("in {}: {}", self.home(table), pairs.join(", "))
    }
}
