//! The documents staged since the last commit, by id.
//!
//! An update whose TOAST value did not change comes without that value; it must be taken from the row's earlier
//! document, and Tantivy cannot read back what is not committed. So every staged document is remembered here
//! until the commit. A deleted document is remembered too: when a key changes, the row's old document is deleted
//! before the new one is made from it.
//!
//! A source transaction may be larger than memory: past [`SPILL_BYTES`] everything moves to a sorted run in an
//! unnamed temporary file, of which memory holds one id per [`BLOCK_BYTES`].

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// What makes a sink ask for a commit, bytes.
const FULL_BYTES: usize = 32 << 20;
/// Most that is held in memory while a source transaction goes on, bytes.
const SPILL_BYTES: usize = 64 << 20;
/// Size of the pieces in which a run is read, bytes.
const BLOCK_BYTES: usize = 64 << 10;
/// What an entry takes beside its strings, roughly, bytes.
const ENTRY_BYTES: usize = 96;

/// Where the earlier document of a row is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Earlier {
    /// Staged: this one.
    Staged(String),
    /// Not staged: as of the last commit, if there.
    Committed,
    /// Nowhere: it was deleted.
    Gone,
}

#[derive(Clone, Debug)]
struct Entry {
    /// The last document staged under this id.
    json: Option<String>,
    alive: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Overlay {
    directory: PathBuf,
    spill_bytes: usize,
    entries: HashMap<String, Entry>,
    bytes: usize,
    /// Oldest first.
    runs: Vec<Run>,
    /// Whether the table was truncated: nothing committed counts any more.
    cleared: bool,
}

impl Overlay {
    /// An empty one that spills into `directory`.
    pub(crate) fn new(directory: &Path) -> Overlay {
        Overlay {
            directory: directory.to_owned(),
            spill_bytes: SPILL_BYTES,
            entries: HashMap::new(),
            bytes: 0,
            runs: Vec::new(),
            cleared: false,
        }
    }

    /// Forgets everything: it was committed, or discarded.
    pub(crate) fn clear(&mut self) {
        *self = Overlay { spill_bytes: self.spill_bytes, ..Overlay::new(&self.directory) };
    }

    /// Whether a commit should come soon.
    pub(crate) fn full(&self) -> bool {
        self.bytes >= FULL_BYTES || !self.runs.is_empty()
    }

    /// A document was staged.
    pub(crate) fn upsert(&mut self, id: &str, json: String) -> io::Result<()> {
        self.put(id, Entry { json: Some(json), alive: true })
    }

    /// A deletion was staged.
    pub(crate) fn delete(&mut self, id: &str) -> io::Result<()> {
        match self.entries.get_mut(id) {
            Some(entry) => {
                entry.alive = false;
                Ok(())
            }
            None => self.put(id, Entry { json: None, alive: false }),
        }
    }

    /// The deletion of everything was staged.
    pub(crate) fn truncate(&mut self) {
        self.clear();
        self.cleared = true;
    }

    /// The document of a row that is there.
    pub(crate) fn row(&self, id: &str) -> io::Result<Earlier> {
        self.find(id, |entry| match entry {
            Entry { alive: false, .. } => Some(Earlier::Gone),
            Entry { json, .. } => json.map(Earlier::Staged),
        })
    }

    /// The last document of a row that is there or was just deleted.
    pub(crate) fn former_row(&self, id: &str) -> io::Result<Earlier> {
        self.find(id, |entry| entry.json.map(Earlier::Staged))
    }

    fn find(&self, id: &str, judge: impl Fn(Entry) -> Option<Earlier>) -> io::Result<Earlier> {
        if let Some(found) = self.entries.get(id).cloned().and_then(&judge) {
            return Ok(found);
        }
        for run in self.runs.iter().rev() {
            if let Some(found) = run.get(id)?.and_then(&judge) {
                return Ok(found);
            }
        }
        Ok(if self.cleared { Earlier::Gone } else { Earlier::Committed })
    }

    fn put(&mut self, id: &str, entry: Entry) -> io::Result<()> {
        let json_len = |entry: &Entry| entry.json.as_ref().map_or(0, |json| json.len());
        self.bytes += json_len(&entry);
        match self.entries.insert(id.to_owned(), entry) {
            Some(replaced) => self.bytes -= json_len(&replaced),
            None => self.bytes += id.len() + ENTRY_BYTES,
        }
        if self.bytes >= self.spill_bytes {
            let run = Run::write(&self.directory, self.entries.drain())?;
            self.runs.push(run);
            self.bytes = 0;
        }
        Ok(())
    }
}

/// Entries in a file, sorted by id: for each the id's length, the document's length plus one (0 for none), one
/// byte for alive, the id, the document.
#[derive(Debug)]
struct Run {
    file: File,
    /// The first id of each block and where the block begins.
    blocks: Vec<(String, u64)>,
    end: u64,
}

const HEAD_BYTES: usize = 9;

impl Run {
    fn write(directory: &Path, entries: impl Iterator<Item = (String, Entry)>) -> io::Result<Run> {
        let mut entries: Vec<(String, Entry)> = entries.collect();
        entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let mut out = BufWriter::new(tempfile::tempfile_in(directory)?);
        let (mut blocks, mut at): (Vec<(String, u64)>, u64) = (Vec::new(), 0);
        for (id, entry) in entries {
            let json = entry.json.as_deref();
            out.write_all(&length(id.len())?)?;
            out.write_all(&length(json.map_or(0, |json| json.len() + 1))?)?;
            out.write_all(&[u8::from(entry.alive)])?;
            out.write_all(id.as_bytes())?;
            out.write_all(json.unwrap_or_default().as_bytes())?;
            let size = HEAD_BYTES + id.len() + json.unwrap_or_default().len();
            if blocks.last().is_none_or(|(_, start)| at - start >= BLOCK_BYTES as u64) {
                blocks.push((id, at));
            }
            at += size as u64;
        }
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(Run { file, blocks, end: at })
    }

    fn get(&self, id: &str) -> io::Result<Option<Entry>> {
        let after = self.blocks.partition_point(|(first, _)| first.as_str() <= id);
        let Some(block) = after.checked_sub(1) else { return Ok(None) };
        let start = self.blocks[block].1;
        let end = self.blocks.get(after).map_or(self.end, |(_, next)| *next);
        let mut file = &self.file;
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(end - start).read_to_end(&mut bytes)?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (found, entry, after) =
                parse(rest).ok_or_else(|| io::Error::other("a spilled run is damaged"))?;
            if found == id {
                return Ok(Some(entry));
            }
            rest = after;
        }
        Ok(None)
    }
}

fn length(bytes: usize) -> io::Result<[u8; 4]> {
    u32::try_from(bytes).map(u32::to_le_bytes).map_err(|_| io::Error::other("a document of more than 4 GiB"))
}

fn parse(bytes: &[u8]) -> Option<(&str, Entry, &[u8])> {
    let (id_len, rest) = bytes.split_first_chunk::<4>()?;
    let (json_len, rest) = rest.split_first_chunk::<4>()?;
    let (alive, rest) = rest.split_first()?;
    let (id, rest) = rest.split_at_checked(u32::from_le_bytes(*id_len) as usize)?;
    let json_len = (u32::from_le_bytes(*json_len) as usize).checked_sub(1);
    let (json, rest) = rest.split_at_checked(json_len.unwrap_or(0))?;
    let json = json_len.and(Some(std::str::from_utf8(json).ok()?.into()));
    Some((std::str::from_utf8(id).ok()?, Entry { json, alive: *alive == 1 }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn staged(json: &str) -> Earlier {
        Earlier::Staged(json.to_owned())
    }

    #[test]
    fn h44_remembers_what_was_staged_and_h32_what_was_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let mut overlay = Overlay::new(directory.path());
        assert_eq!(overlay.row("1").unwrap(), Earlier::Committed);
        overlay.upsert("1", "{1}".into()).unwrap();
        assert_eq!(overlay.row("1").unwrap(), staged("{1}"));
        overlay.delete("1").unwrap();
        assert_eq!(overlay.row("1").unwrap(), Earlier::Gone);
        assert_eq!(overlay.former_row("1").unwrap(), staged("{1}"));
        overlay.delete("2").unwrap();
        assert_eq!(overlay.row("2").unwrap(), Earlier::Gone);
        assert_eq!(overlay.former_row("2").unwrap(), Earlier::Committed);
        overlay.truncate();
        assert_eq!(overlay.former_row("1").unwrap(), Earlier::Gone);
        overlay.clear();
        assert_eq!(overlay.row("1").unwrap(), Earlier::Committed);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Upsert(u8, String),
        Delete(u8),
        Truncate,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            20 => (0..40u8, "[a-z]{0,80}").prop_map(|(id, json)| Step::Upsert(id, json)),
            8 => (0..40u8).prop_map(Step::Delete),
            1 => Just(Step::Truncate),
        ];
        proptest::collection::vec(step, 0..200)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn spilling_changes_nothing(steps in steps()) {
            let directory = tempfile::tempdir().unwrap();
            let mut memory = Overlay::new(directory.path());
            let mut spilled = Overlay { spill_bytes: 2_000, ..Overlay::new(directory.path()) };
            for step in steps {
                for overlay in [&mut memory, &mut spilled] {
                    match &step {
                        Step::Upsert(id, json) => overlay.upsert(&id.to_string(), json.clone()).unwrap(),
                        Step::Delete(id) => overlay.delete(&id.to_string()).unwrap(),
                        Step::Truncate => overlay.truncate(),
                    }
                }
                for id in (0..40).map(|id: u8| id.to_string()) {
                    prop_assert_eq!(memory.row(&id).unwrap(), spilled.row(&id).unwrap());
                    prop_assert_eq!(memory.former_row(&id).unwrap(), spilled.former_row(&id).unwrap());
                }
            }
        }
    }
}
