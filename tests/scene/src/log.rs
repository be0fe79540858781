//! Entries of the daemon's log, in either of its two formats. The field `event` says with a stable name what an entry is
//! about. Tests wait for events and read fields, so that the words of a message can change.

use serde_json::Value;

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry(Line);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Line {
    /// `log-format = "json"`: an object of strings.
    Json(Value),
    /// `log-format = "text"`: time, level, message, and then `name=value` for each field, sorted by name.
    Text(String),
}

impl Entry {
    fn parse(line: &str) -> Self {
        let json = serde_json::from_str(line).ok().filter(Value::is_object);
        Self(json.map_or_else(|| Line::Text(line.to_owned()), Line::Json))
    }

    /// The value of a field. In a line of text nothing marks where a value ends, so it ends before the next word that
    /// looks like a field.
    pub fn field(&self, name: &str) -> Option<&str> {
        match &self.0 {
            Line::Json(object) => object[name].as_str(),
            Line::Text(line) => {
                let begin = line.rfind(&format!(" {name}="))? + name.len() + 2;
                let value = &line[begin..];
                let spaces = value.match_indices(' ').map(|(space, _)| space);
                let end = spaces.into_iter().find(|&space| is_field(&value[space + 1..]));
                Some(&value[..end.unwrap_or(value.len())])
            }
        }
    }

    pub fn event(&self) -> Option<&str> {
        self.field("event")
    }

    /// `error`, `warning`, `info`, `debug` or `trace`.
    pub fn level(&self) -> &str {
        match &self.0 {
            Line::Json(_) => self.field("level").unwrap_or_default(),
            Line::Text(line) => line.split_whitespace().nth(1).unwrap_or_default(),
        }
    }
}

/// Whether a text begins with `name=`.
fn is_field(text: &str) -> bool {
    text.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-')
    })
}

/// All entries of a log.
pub fn entries(log: &str) -> impl Iterator<Item = Entry> {
    log.lines().map(Entry::parse)
}

/// The entries of one event, in their order.
pub fn events(log: &str, event: &str) -> Vec<Entry> {
    entries(log).filter(|entry| entry.event() == Some(event)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{"event":"reserve_used","level":"warning","msg":"no event=x","path":"/a b","time":"t"}
{"event":"started","level":"info","msg":"serves","time":"t"}
{"level":"error","msg":"thread worker panicked","time":"t"}
"#;
    const TEXT: &str = "2026-11-30T17:00:00Z warning the disk is full, key = x attempt=2 event=reserve_used path=/a b\n\
                        2026-11-30T17:00:01Z info    serves event=started\n\
                        2026-11-30T17:00:02Z error   thread worker panicked\n";

    #[test]
    fn events_and_fields_are_found_in_both_log_formats() {
        for log in [JSON, TEXT] {
            let [entry] = &events(log, "reserve_used")[..] else { panic!("one entry has the event: {log}") };
            assert_eq!((entry.level(), entry.field("path")), ("warning", Some("/a b")));
            assert_eq!(entry.field("absent"), None);
            assert_eq!(events(log, "started").len(), 1);
            assert_eq!(events(log, "start"), []);
            let levels: Vec<String> = entries(log).map(|entry| entry.level().to_owned()).collect();
            assert_eq!(levels, ["warning", "info", "error"]);
        }
        assert_eq!(events(TEXT, "reserve_used")[0].field("attempt"), Some("2"));
    }
}
