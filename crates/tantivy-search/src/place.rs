//! How a copy takes an index's place.
//!
//! The copy of `<directory>/<name>` is built at `<name>.copy`. That directory, empty at first, is also what says that a
//! copy is asked for: one `mkdir`, by the worker or by any other program. It becomes the index in two renames:
//!
//! 1. `<name>` → `<name>.replaced`. From here on the swap is decided.
//! 2. `<name>.copy` → `<name>`.
//!
//! A kill before the first leaves the old index; one between them leaves no `<name>` but both others, and whoever opens
//! the index next goes on with the second. Neither is ever half there, and the request ends in the same step. Those who
//! read the old index have its files open and lose nothing.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use worker::SinkError;

use crate::index::{beside, remove_directory, unavailable};

/// Where an index's copy is.
pub(crate) fn copy_of(path: &Path) -> PathBuf {
    beside(path, "copy")
}

/// Asks for the copy of an index; `false` if it was asked for already.
pub(crate) fn request(path: &Path) -> Result<bool, SinkError> {
    let copy = copy_of(path);
    match fs::create_dir(&copy) {
        Ok(()) => {
            sync_parent(path)?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(unavailable(&copy, &error)),
    }
}

/// Puts the copy in the index's place, and removes what was there. Neither may be open for writing.
pub(crate) fn swap(path: &Path) -> Result<(), SinkError> {
    let replaced = replaced(path);
    remove_directory(&replaced)?;
    rename(path, &replaced)?;
    rename(&copy_of(path), path)?;
    remove_directory(&replaced)
}

/// Ends a swap that was decided. To be called before the index is opened.
pub(crate) fn settle(path: &Path) -> Result<(), SinkError> {
    let replaced = replaced(path);
    if replaced.exists() {
        if !path.exists() {
            rename(&copy_of(path), path)?;
        }
        if !path.exists() {
            rename(&replaced, path)?;
        }
        remove_directory(&replaced)?;
    }
    Ok(())
}

/// All that can stand on disk for an index.
pub(crate) fn all(path: &Path) -> Vec<PathBuf> {
    let copy = copy_of(path);
    vec![beside(path, "new"), beside(&copy, "new"), copy, replaced(path), path.to_owned()]
}

fn replaced(path: &Path) -> PathBuf {
    beside(path, "replaced")
}

/// Renames durably, if there is something to rename.
fn rename(from: &Path, to: &Path) -> Result<(), SinkError> {
    match fs::rename(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(unavailable(from, &error)),
        Err(_) => Ok(()),
        Ok(()) => sync_parent(to),
    }
}

fn sync_parent(path: &Path) -> Result<(), SinkError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(|error| unavailable(parent, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(path: &Path, text: &str) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join("meta.json"), text).unwrap();
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn h42_a_swap_killed_anywhere_leaves_one_whole_index() {
        for (kill, shown, left) in [
            (0, "old", vec!["emails", "emails.copy"]),
            (1, "new", vec!["emails"]),
            (2, "new", vec!["emails"]),
            (3, "new", vec!["emails"]),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("emails");
            marked(&path, "old");
            marked(&copy_of(&path), "new");
            match kill {
                0 => {}
                1 => rename(&path, &replaced(&path)).unwrap(),
                2 => {
                    rename(&path, &replaced(&path)).unwrap();
                    rename(&copy_of(&path), &path).unwrap();
                }
                _ => swap(&path).unwrap(),
            }
            settle(&path).unwrap();
            assert_eq!(fs::read_to_string(path.join("meta.json")).unwrap(), shown, "killed at {kill}");
            assert_eq!(names(directory.path()), left, "killed at {kill}");
        }
    }

    #[test]
    fn a_copy_of_nothing_becomes_the_index_and_a_second_request_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("emails");
        assert!(request(&path).unwrap());
        marked(&copy_of(&path), "new");
        assert!(!request(&path).unwrap());
        swap(&path).unwrap();
        assert_eq!(names(directory.path()), ["emails"]);
        assert_eq!(fs::read_to_string(path.join("meta.json")).unwrap(), "new");
    }
}
