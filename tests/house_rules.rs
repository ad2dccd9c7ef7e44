//! Holds ARCHITECTURE.md's "may not" column by reading the sources.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// A word that only some rooms may use, and why.
struct Rule {
    word: &'static str,
    /// Rooms (folders of `src/`) that may; everything else may not.
    allowed: &'static [&'static str],
    reason: &'static str,
}

const RULES: &[Rule] = &[
    Rule { word: "quinn::", allowed: &["transport"], reason: "ask transport for a connection" },
    Rule { word: "rustls::", allowed: &["transport"], reason: "trust is transport's business" },
    Rule { word: "quinn_proto::", allowed: &["transport"], reason: "ask transport for a connection" },
    Rule { word: "ring::hmac", allowed: &["transport"], reason: "keys are transport's business" },
    Rule { word: "rcgen::", allowed: &["transport"], reason: "certificates are transport's business" },
    Rule { word: "bincode::", allowed: &["protocol"], reason: "protocol encodes every message" },
    Rule { word: "rusqlite::", allowed: &["journal"], reason: "append records to the journal" },
    Rule { word: "object_store::", allowed: &["store"], reason: "blobs go through store" },
    Rule {
        word: "cudarc::",
        allowed: &["nvidia", "gpu", "model", "collective"],
        reason: "ask nvidia which GPUs there are",
    },
    Rule { word: "actix_web::", allowed: &["gateway"], reason: "only the gateway knows HTTP" },
    Rule { word: "crate::bench", allowed: &["bench"], reason: "what is measured knows no measurement" },
    Rule { word: "crate::coordinator", allowed: &["coordinator", "service"], reason: "speak its protocol" },
    Rule {
        word: "actix::",
        allowed: &["coordinator", "node", "trainer", "sampler"],
        reason: "no actor here",
    },
    Rule {
        word: "anyhow::",
        allowed: &["main.rs", "cli"],
        reason: "a library's errors are enums that say whose fault it is",
    },
    Rule { word: ".do_send(", allowed: &[], reason: "it drops silently; use try_send with a rule for Full" },
    Rule { word: "todo!(", allowed: &[], reason: "nothing unfinished lands" },
    Rule { word: "unimplemented!(", allowed: &[], reason: "nothing unfinished lands" },
];

/// Rooms with an actor, by name: each has a state machine.
const ACTOR_ROOMS: &[&str] = &["coordinator", "node", "sampler", "trainer"];

/// What a pure state machine may not know: `(word, reason)`.
const IMPURE: &[(&str, &str)] = &[
    ("tokio::", "the actor performs effects"),
    ("actix", "the actor performs effects"),
    ("Instant::now", "time comes in with the event"),
    ("SystemTime", "time comes in with the event"),
    ("getrandom", "randomness comes in with the event"),
    ("std::fs", "the actor performs effects"),
    ("std::thread", "the actor performs effects"),
];

fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("a source folder");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a folder's entry").path())
        .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect();
    files.sort();
    files
}

/// The lines of code of a file, numbered: without comments, and without what is only there for
/// tests, wherever it stands.
fn code(path: &Path) -> Vec<(usize, String)> {
    code_of(&fs::read_to_string(path).expect("a source file"))
}

fn code_of(text: &str) -> Vec<(usize, String)> {
    let mut lines = text.lines().enumerate();
    let mut code = Vec::new();
    while let Some((number, line)) = lines.next() {
        if line.trim_start().starts_with("#[cfg(test)]") {
            skip_item(&mut lines);
        } else {
            code.push((number + 1, line.split("//").next().unwrap_or_default().to_owned()));
        }
    }
    code
}

/// Reads past the item behind an attribute: to the line that closes it at the indentation at which it
/// began, which is where rustfmt puts it.
fn skip_item<'a>(lines: &mut impl Iterator<Item = (usize, &'a str)>) {
    let Some((_, first)) = lines.find(|(_, line)| {
        let line = line.trim_start();
        !line.is_empty() && !line.starts_with("#[") && !line.starts_with("//")
    }) else {
        return;
    };
    let ended = |line: &str| {
        let code = line.split("//").next().unwrap_or_default().trim_end();
        code.ends_with(';') || code.ends_with('}') || code.ends_with(',')
    };
    if ended(first) {
        return;
    }
    let indent = |line: &str| line.len() - line.trim_start().len();
    let depth = indent(first);
    lines.find(|(_, line)| !line.trim().is_empty() && indent(line) <= depth && ended(line));
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src")
}

#[test]
fn each_room_keeps_to_its_job() {
    let mut broken = Vec::new();
    for path in sources(&root()) {
        let relative = path.strip_prefix(root()).expect("below src").to_owned();
        let room = relative.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned());
        let room = room.unwrap_or_default();
        if relative.components().any(|c| c.as_os_str() == "tests" || c.as_os_str() == "tests.rs") {
            continue;
        }
        for (number, line) in code(&path) {
            for rule in RULES.iter().filter(|rule| line.contains(rule.word)) {
                if !rule.allowed.contains(&room.as_str()) {
                    broken.push(format!(
                        "src/{}:{number}: `{}`: {}",
                        relative.display(),
                        rule.word,
                        rule.reason
                    ));
                }
            }
        }
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn state_machines_are_pure() {
    let mut broken = Vec::new();
    let mut seen = BTreeSet::new();
    for path in sources(&root()) {
        let is_state = path.components().any(|c| c.as_os_str() == "state")
            || path.file_name().is_some_and(|name| name == "state.rs");
        let room = ACTOR_ROOMS.iter().find(|room| path.starts_with(root().join(room)));
        let (true, Some(room)) = (is_state, room) else { continue };
        seen.insert(*room);
        for (number, line) in code(&path) {
            for (word, reason) in IMPURE.iter().filter(|(word, _)| line.contains(word)) {
                broken.push(format!("{}:{number}: `{word}`: {reason}", path.display()));
            }
        }
    }
    assert!(seen.iter().eq(ACTOR_ROOMS), "each of {ACTOR_ROOMS:?} has a state machine; found {seen:?}");
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn code_behind_the_tests_of_a_file_is_read_too() {
    let text = "use a; // b\n\
                #[cfg(test)]\n\
                mod tests {\n    fn c() {\n        d();\n    }\n}\n\
                impl E {\n    #[cfg(test)]\n    fn f(\n        g: H,\n    ) {\n        i();\n    }\n    fn j() {}\n}\n\
                #[cfg(test)]\n\
                mod k;\n\
                fn l() {}\n";
    let numbers: Vec<usize> = code_of(text).into_iter().map(|(number, _)| number).collect();
    assert_eq!(numbers, [1, 8, 15, 16, 19], "{:?}", code_of(text));
}

#[test]
fn a_file_has_one_subject() {
    let long: Vec<String> = sources(&root())
        .into_iter()
        .filter_map(|path| {
            let lines = fs::read_to_string(&path).expect("a source file").lines().count();
            (lines > 500).then(|| format!("{} has {lines} lines", path.display()))
        })
        .collect();
    assert!(
        long.is_empty(),
        "past 500 lines a file has a second subject; give it a file:\n{}",
        long.join("\n")
    );
}
