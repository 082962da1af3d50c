//! What a power loss takes from a broker's files: the end that was written and not yet flushed to the disk.

use std::fs;
use std::path::{Path, PathBuf};

use super::Kafka;

/// Bytes of a record batch before its length counts.
const BATCH_PREFIX: usize = 12;

/// How the last batch that a power loss hits ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Torn {
    /// The file ends between two batches.
    Between,
    /// The file ends in the middle of a batch.
    Short,
    /// The file has its length, but the second half of a batch is zeros.
    Zeros,
}

impl Kafka {
    /// Number of whole record batches in the files of partition 0 of a topic; a transaction's end is one too.
    pub fn batches(&self, topic: &str) -> usize {
        let segments = segments(&self.partition(topic));
        segments.iter().map(|segment| batch_ends(&fs::read(segment).unwrap_or_default()).len()).sum()
    }

    /// Takes all but the first `kept` batches from the files, as if the broker's machine had lost power. What the broker
    /// would derive from the lost part goes too. Returns the number of batches lost.
    ///
    /// # Panics
    /// While the broker runs, or when the files cannot be changed.
    pub fn lose_batches_after(&self, topic: &str, kept: usize, torn: Torn) -> usize {
        assert!(!self.runs(), "the broker has these files open");
        let directory = self.partition(topic);
        let (mut left, mut lost) = (kept, 0);
        for segment in segments(&directory) {
            let content = fs::read(&segment).expect("our own file");
            let ends = batch_ends(&content);
            if lost > 0 {
                fs::remove_file(segment).expect("our own directory");
                lost += ends.len();
            } else if left >= ends.len() {
                left -= ends.len();
            } else {
                let keep = left.checked_sub(1).map_or(0, |last| ends[last]);
                fs::write(&segment, cut(&content, keep, ends[left], torn)).expect("our own file");
                forget_derived(&directory, base_offset(&content[keep..]));
                lost = ends.len() - left;
            }
        }
        // Left by an orderly end, which this was not.
        let _ = fs::remove_file(self.directory().join("data/.kafka_cleanshutdown"));
        lost
    }

    fn partition(&self, topic: &str) -> PathBuf {
        self.directory().join("data").join(format!("{topic}-0"))
    }
}

/// The files that hold records, in order.
fn segments(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut segments: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    segments.retain(|path| path.extension().is_some_and(|end| end == "log"));
    segments.sort();
    segments
}

/// Where each whole record batch of a segment ends.
fn batch_ends(content: &[u8]) -> Vec<usize> {
    let (mut ends, mut at) = (Vec::new(), 0);
    while let Some(length) = content.get(at + BATCH_PREFIX - 4..at + BATCH_PREFIX) {
        let length = u32::from_be_bytes(length.try_into().expect("four bytes"));
        at += BATCH_PREFIX + length as usize;
        if length == 0 || at > content.len() {
            break;
        }
        ends.push(at);
    }
    ends
}

/// The content up to `keep`, and what is left of the batch that ends at `next`.
fn cut(content: &[u8], keep: usize, next: usize, torn: Torn) -> Vec<u8> {
    let middle = keep + (next - keep) / 2;
    match torn {
        Torn::Between => content[..keep].to_vec(),
        Torn::Short => content[..middle].to_vec(),
        Torn::Zeros => [&content[..middle], &vec![0; next - middle]].concat(),
    }
}

fn base_offset(batch: &[u8]) -> u64 {
    let (offset, _) = batch.split_first_chunk().expect("a batch begins with its offset");
    u64::from_be_bytes(*offset)
}

/// Removes indexes, which the broker builds again, and what it knew of producers behind the new end.
fn forget_derived(directory: &Path, end: u64) {
    for entry in fs::read_dir(directory).expect("our own directory").flatten() {
        let path = entry.path();
        let (Some(stem), Some(kind)) = (path.file_stem(), path.extension()) else { continue };
        let Ok(offset) = stem.to_string_lossy().parse::<u64>() else { continue };
        let derived = ["index", "timeindex", "txnindex"].iter().any(|name| kind == *name);
        if derived || (kind == "snapshot" && offset > end) {
            fs::remove_file(path).expect("our own file");
        }
    }
}
