//! Prose that is on the machine anyway, as letters: documentation and licences of the base system, of Rust, and of
//! the libraries that this program is built from.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use change::Refusal;

/// Files above this are generated more often than written.
const MAX_FILE_BYTES: u64 = 1_000_000;
/// Of one directory named; so that the last one is heard too.
const MAX_BYTES_PER_ROOT: u64 = 12_000_000;
const MAX_DEPTH: usize = 8;
/// Bytes of one paragraph.
const PARAGRAPH: std::ops::RangeInclusive<usize> = 100..=1_500;
/// Paragraphs of one letter.
const MAX_PARAGRAPHS: usize = 4;
const MAX_SUBJECT_CHARS: usize = 68;
/// With fewer it would be the same few letters again and again.
const FEWEST: usize = 300;

/// One letter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Letter {
    /// The work it is from, as an address.
    pub(super) sender: String,
    pub(super) subject: String,
    pub(super) body: String,
}

/// All letters found.
pub(super) struct Letters(Arc<Vec<Letter>>);

impl Letters {
    /// Reads them from the directories; refused where there are too few.
    pub(super) fn read(roots: &[PathBuf]) -> Result<Self, Refusal> {
        let mut seen = HashSet::new();
        let mut letters = Vec::new();
        for root in roots {
            let mut files = Vec::new();
            collect(root, MAX_DEPTH, &mut files);
            let mut left = MAX_BYTES_PER_ROOT;
            for file in files {
                let size = fs::metadata(&file).map_or(u64::MAX, |found| found.len());
                if size > MAX_FILE_BYTES || size > left {
                    continue;
                }
                left -= size;
                // What is not UTF-8 is no prose for us.
                if let Ok(text) = fs::read_to_string(&file) {
                    letters.extend(letters_of(&sender(&file), &text, &mut seen));
                }
            }
        }
        if letters.len() < FEWEST {
            let what = format!("only {} letters could be made of the texts in {roots:?}", letters.len());
            return Err(Refusal::new(what, "name a directory with documentation: --text DIRECTORY"));
        }
        Ok(Letters(Arc::new(letters)))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// How many works they are from.
    pub(super) fn works(&self) -> usize {
        self.0.iter().map(|letter| &letter.sender).collect::<BTreeSet<_>>().len()
    }

    pub(super) fn share(&self) -> Arc<Vec<Letter>> {
        self.0.clone()
    }
}

/// Files that people wrote for people, in a fixed order. What cannot be read is passed over; links are not followed.
fn collect(directory: &Path, depth: usize, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth > 0 => collect(&path, depth - 1, files),
            Ok(kind) if kind.is_file() && is_prose(&path) => files.push(path),
            _ => {}
        }
    }
}

fn is_prose(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let extension = path.extension().and_then(|extension| extension.to_str());
    let licences = path.parent().is_some_and(|directory| directory.ends_with("common-licenses"));
    matches!(extension, Some("md" | "pod" | "txt")) || name.starts_with("README") || licences
}

/// `/usr/share/doc/tar/README` is from `tar`; a file that is a work itself, as `perlfaq4.pod` is, from that.
fn sender(file: &Path) -> String {
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let generic = stem.chars().all(|c| c.is_ascii_uppercase() || matches!(c, '_' | '-'));
    let directory =
        file.parent().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default();
    let name = if generic && !directory.is_empty() { directory } else { stem };
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    format!("{}@example.org", name.chars().map(plain).collect::<String>().trim_matches('-'))
}

/// A letter is up to [`MAX_PARAGRAPHS`] paragraphs that follow each other; its subject is how it begins.
fn letters_of(sender: &str, text: &str, seen: &mut HashSet<String>) -> Vec<Letter> {
    let mut letters = Vec::new();
    let mut body: Vec<String> = Vec::new();
    let mut flush = |body: &mut Vec<String>| {
        if let Some(first) = body.first() {
            let subject = subject(first);
            letters.push(Letter { sender: sender.to_owned(), subject, body: body.join("\n\n") });
            body.clear();
        }
    };
    for paragraph in text.replace("\r\n", "\n").split("\n\n") {
        match prose(paragraph) {
            // Licences are in a thousand places.
            Some(paragraph) if seen.insert(paragraph.clone()) => body.push(paragraph),
            _ => flush(&mut body),
        }
        if body.len() == MAX_PARAGRAPHS {
            flush(&mut body);
        }
    }
    flush(&mut body);
    letters
}

/// The paragraph on one line, if it is sentences and neither code nor a table nor a list.
fn prose(paragraph: &str) -> Option<String> {
    let first = paragraph.trim_start_matches('\n');
    if first.starts_with([' ', '\t', '#', '=', '|', '-', '*', '`', '<', '[']) {
        return None;
    }
    let line = first.split_whitespace().collect::<Vec<_>>().join(" ");
    let letters = line.chars().filter(|c| c.is_alphabetic() || *c == ' ').count();
    let sentences = line.starts_with(char::is_uppercase) && line.ends_with(['.', '!', '?', ':']);
    let plain = letters * 100 >= line.chars().count() * 92;
    // Links would be half of a subject, and Postgres' text has no NUL.
    let marked = line.contains("](") || line.contains("://") || line.contains('\0');
    (PARAGRAPH.contains(&line.len()) && sentences && plain && !marked).then_some(line)
}

fn subject(paragraph: &str) -> String {
    let sentence = paragraph.split(['.', '!', '?', ':', ';']).next().unwrap_or(paragraph);
    let mut subject = String::new();
    for word in sentence.split(' ') {
        if subject.chars().count() + 1 + word.chars().count() > MAX_SUBJECT_CHARS {
            break;
        }
        if !subject.is_empty() {
            subject.push(' ');
        }
        subject.push_str(word);
    }
    subject
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_becomes_letters_and_code_does_not() {
        let text = "# Title\n\nA library of such quality that one hardly believes it is free: many people wrote it in\n\
                    their evenings, and many more are glad of it.\n\n    let code = true;\n\n\
                    The second letter begins here, after the code, and is as long as a letter has to be to be taken\n\
                    for one.\n\nfn x() { y(); }\n";
        let letters = letters_of("a@example.org", text, &mut HashSet::new());
        let subjects: Vec<&str> = letters.iter().map(|letter| letter.subject.as_str()).collect();
        assert_eq!(
            subjects,
            [
                "A library of such quality that one hardly believes it is free",
                "The second letter begins here, after the code, and is as long as a"
            ]
        );
        assert!(letters[0].body.ends_with("glad of it."), "{}", letters[0].body);
    }

    #[test]
    fn the_same_paragraph_is_one_letter_only() {
        let text = "Permission is hereby granted to anybody who obtains a copy of this text to read it as often as \
                    they please.";
        let mut seen = HashSet::new();
        assert_eq!(letters_of("a", text, &mut seen).len(), 1);
        assert_eq!(letters_of("b", text, &mut seen).len(), 0);
    }

    #[test]
    fn senders_are_works() {
        assert_eq!(sender(Path::new("/usr/share/doc/tar/README")), "tar@example.org");
        assert_eq!(sender(Path::new("/usr/share/perl/5.36/pod/perlfaq4.pod")), "perlfaq4@example.org");
    }

    #[test]
    fn too_little_text_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("README.md"), "Too short.").unwrap();
        let refused = Letters::read(&[directory.path().to_owned()]).err().unwrap();
        assert!(refused.to_string().contains("only 0 letters"), "{refused}");
    }
}
