//! What other programs do with an index's directory: ask for a rebuild, and remove it.

use std::path::{Path, PathBuf};

use change::Refusal;
use worker::SinkError;

use crate::place;

/// Asks the search process, running or not, to build an index anew beside the one it shows; `false` if that was asked
/// for already and goes on.
///
/// It makes an empty directory beside the index and touches nothing that is there: a process that works in the
/// directory looks for it. Unlike a request over HTTP this works while no process runs, outlives every kill by itself,
/// and needs no way to command a process over a port that is meant for readers.
pub fn request_rebuild(directory: &Path, index: &str) -> Result<bool, SinkError> {
    if !directory.is_dir() {
        let what = format!("the search directory {} is not on this host", directory.display());
        let remedy = "run this where `millrace search` keeps its indexes; where it has never run it fills them by itself";
        return Err(Refusal::new(what, remedy).into());
    }
    place::request(&directory.join(index))
}

/// Whether a rebuild of an index was asked for and has not ended.
pub fn rebuild_requested(directory: &Path, index: &str) -> bool {
    place::copy_of(&directory.join(index)).exists()
}

/// The directories that stand for an index, to remove while no process works in them.
pub fn directories_of(directory: &Path, index: &str) -> Vec<PathBuf> {
    place::all(&directory.join(index)).into_iter().filter(|path| path.exists()).collect()
}
