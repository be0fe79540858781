//! How texts that a client or a publisher chose are shown: in messages, on terminals, and in commands to be pasted.
#![forbid(unsafe_code)]

use std::fmt;

/// A client's text for a message, quoted and shortened. Texts may be long and may contain line breaks, and a gRPC
/// status of more than some kilobytes is not delivered at all.
pub struct Quoted<'t>(pub &'t str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAX_SHOWN: usize = 200;
        match self.0.char_indices().nth(MAX_SHOWN) {
            None => write!(f, "{:?}", self.0),
            Some((cut, _)) => write!(f, "{:?}… ({} bytes)", &self.0[..cut], self.0.len()),
        }
    }
}

/// Whether a terminal obeys the character and does not just show it. Characters without width, and those that change
/// the direction of writing, count as well.
fn is_control(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// The text with `?` for every control character, for output on a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if is_control(c) { '?' } else { c }).collect()
}

/// The text with every control character escaped, for output on a terminal that must not lose what was there.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if is_control(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// The word in quotes, if the shell needs them. References of images, as containerd writes them, need none.
pub fn shell_quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "./:@_-+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// The last arguments of a command, quoted for the shell. A `--` comes first if the program could take one of them for
/// an option.
pub fn shell_quote_all<'w>(words: impl IntoIterator<Item = &'w str>) -> String {
    let words: Vec<&str> = words.into_iter().collect();
    let end_of_options = words.iter().any(|word| word.starts_with('-')).then(|| "--".to_owned());
    end_of_options.into_iter().chain(words.into_iter().map(shell_quote)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_quoting_lets_no_reference_break_out_of_the_command() {
        assert_eq!(shell_quote("registry.example:5000/a/b@sha256:00"), "registry.example:5000/a/b@sha256:00");
        assert_eq!(shell_quote("a'; rm -rf /"), "'a'\\''; rm -rf /'");
        assert_eq!(shell_quote_all(["a:1", "b c"]), "a:1 'b c'");
        assert_eq!(shell_quote_all(["a:1", "-rf"]), "-- a:1 -rf");
    }
}
