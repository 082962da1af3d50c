//! One index on disk: found, made, written, read.
//!
//! `<directory>/<name>/` is Tantivy's directory. Its `meta.json` lists the segments and carries our payload, and
//! is replaced by one rename: a kill at any moment leaves the documents and the checkpoint of one commit. Power loss
//! can bring back an older `meta.json`, and with it the older checkpoint: the log still holds what is missing. An
//! index is made as `<path>.new`, committed with its checkpoint, and put in place by a rename over what was emptied.
//! `place.rs` says how a copy takes an index's place.

use std::fs::{self, File};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use tantivy::directory::error::OpenReadError;
use tantivy::indexer::{IndexWriterOptions, UserOperation};
use tantivy::merge_policy::LogMergePolicy;
use tantivy::query::AllQuery;
use tantivy::schema::{Field, IndexRecordOption, STORED, Schema, TextFieldIndexing, TextOptions, Value};
use tantivy::{
    DocAddress, DocSet, Index, IndexReader, IndexWriter, ReloadPolicy, Searcher, TERMINATED, TantivyDocument,
    TantivyError, Term,
};
use worker::{Checkpoint, SinkError};

use crate::Options;
use crate::definition::{IndexDefinition, Role};
use crate::indexes::View;
use crate::payload::{self, Payload, PayloadError};

/// A segment is merged when this share of its documents is deleted.
const MERGE_DELETED_SHARE: f32 = 0.3;
/// Splits text into words and folds their case; words of more than 40 bytes are left out.
pub(crate) const WORDS: &str = "default";
const RAW: &str = "raw";

/// A definition, and Tantivy's fields for it. Their names are ours: a column's name may have dots, which Tantivy takes
/// for paths.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) definition: IndexDefinition,
    pub(crate) schema: Schema,
    /// The document's id, the term that upserts and deletes go by.
    pub(crate) id: Field,
    /// The document as JSON.
    pub(crate) json: Field,
    /// A field for each of the definition's roles, in their order.
    pub(crate) fields: Vec<Field>,
}

pub(crate) const ID: &str = "_id";

impl Layout {
    pub(crate) fn new(definition: IndexDefinition) -> Layout {
        let raw = TextFieldIndexing::default()
            .set_tokenizer(RAW)
            .set_index_option(IndexRecordOption::Basic)
            .set_fieldnorms(false);
        let raw = TextOptions::default().set_indexing_options(raw).set_fast(RAW);
        let words = TextFieldIndexing::default()
            .set_tokenizer(WORDS)
            .set_index_option(IndexRecordOption::WithFreqsAndPositions);
        let words = TextOptions::default().set_indexing_options(words);
        let mut schema = Schema::builder();
        let id = schema.add_text_field(ID, raw.clone());
        let json = schema.add_text_field("_json", STORED);
        let fields = definition.roles().enumerate().map(|(place, (role, _))| {
            let options = if role == Role::Text { &words } else { &raw };
            schema.add_text_field(&Layout::name(place), options.clone())
        });
        let fields = fields.collect();
        Layout { schema: schema.build(), id, json, fields, definition }
    }

    /// The first role in which a column can be filtered, with its place among the definition's roles.
    pub(crate) fn filterable(&self, column: &str) -> Option<(Role, usize)> {
        let mut roles = self.definition.roles().enumerate();
        roles
            .find(|(_, (role, name))| *role != Role::Text && *name == column)
            .map(|(place, (role, _))| (role, place))
    }

    /// Name of the field of a role.
    pub(crate) fn name(place: usize) -> String {
        format!("f{place}")
    }
}

/// An index that is open for writing.
pub(crate) struct OpenIndex {
    path: PathBuf,
    layout: Arc<Layout>,
    writer: IndexWriter,
    reader: IndexReader,
    /// As of the last commit.
    searcher: Searcher,
    /// What the last commit says.
    payload: Payload,
}

/// What stands under an index's name.
pub(crate) enum Found {
    Empty,
    Damaged(String),
    /// An index of another definition, to be read only; without a view where it does not say which.
    Foreign(Box<(Payload, Option<View>)>),
    Open(Box<OpenIndex>),
}

/// Opens an index if it is what it says. `thorough`: read every byte and compare the checksums.
pub(crate) fn open(
    path: &Path,
    layout: &Arc<Layout>,
    options: &Options,
    thorough: bool,
) -> Result<Found, SinkError> {
    remove_directory(&beside(path, "new"))?;
    match fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
        Ok(false) => {}
        Ok(true) => return Ok(Found::Empty),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Empty),
        Err(error) => return Err(unavailable(path, &error)),
    }
    let name = &layout.definition.name;
    let payload = match read_payload(path)? {
        Ok(payload) => payload,
        Err(PayloadError::Newer(format)) => return Err(payload::newer(name, format).into()),
        Err(PayloadError::Unreadable(reason)) => return Ok(Found::Damaged(format!("meta.json: {reason}"))),
    };
    if payload.checkpoint.definition != layout.definition.hash() {
        // Damaged files can make Tantivy panic.
        let view = catch_unwind(AssertUnwindSafe(|| foreign_view(path, &payload)));
        return Ok(Found::Foreign(Box::new((payload, view.unwrap_or_default()))));
    }
    let opened = catch_unwind(AssertUnwindSafe(|| OpenIndex::open(path, layout, options, payload, thorough)));
    match opened {
        Ok(Ok(index)) => Ok(Found::Open(Box::new(index))),
        Ok(Err(Unusable::Damaged(reason))) => Ok(Found::Damaged(reason)),
        Ok(Err(Unusable::Away(error))) => Err(unavailable(path, &error)),
        Err(_) => Ok(Found::Damaged("its files cannot be read".to_owned())),
    }
}

/// What an index of another definition shows, if it can be read.
fn foreign_view(path: &Path, payload: &Payload) -> Option<View> {
    let layout = Arc::new(Layout::new(payload.index.clone()?));
    let index = Index::open_in_dir(path).ok()?;
    if index.schema() != layout.schema {
        return None;
    }
    let reader: IndexReader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into().ok()?;
    Some(View { searcher: reader.searcher(), payload: payload.clone(), layout })
}

/// Puts an index that holds nothing but a checkpoint in the place of whatever is there.
pub(crate) fn create(
    path: &Path,
    layout: &Arc<Layout>,
    options: &Options,
    checkpoint: &Checkpoint,
) -> Result<Box<OpenIndex>, SinkError> {
    let new = beside(path, "new");
    remove_directory(&new)?;
    let payload = Payload::empty(checkpoint, Some(layout.definition.clone()));
    create_at(&new, layout, options, &payload).map_err(|error| unavailable(&new, &error))?;
    let put = || {
        // The directory itself stays: that it is there can mean something.
        empty_directory(path)?;
        fs::rename(&new, path)?;
        File::open(&options.directory)?.sync_all()
    };
    put().map_err(|error| unavailable(path, &error))?;
    match open(path, layout, options, false)? {
        Found::Open(index) => Ok(index),
        _ => Err(SinkError::Unavailable(format!("{}: it changed while it was made", path.display()))),
    }
}

fn empty_directory(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn create_at(path: &Path, layout: &Layout, options: &Options, payload: &Payload) -> tantivy::Result<()> {
    fs::create_dir_all(path)?;
    let index = Index::create_in_dir(path, layout.schema.clone())?;
    let mut writer = new_writer(&index, options)?;
    let mut commit = writer.prepare_commit()?;
    commit.set_payload(&payload.to_json());
    commit.commit()?;
    Ok(())
}

fn new_writer(index: &Index, options: &Options) -> tantivy::Result<IndexWriter> {
    let settings = IndexWriterOptions::builder()
        .memory_budget_per_thread(options.heap_bytes / options.threads.max(1))
        .num_worker_threads(options.threads.max(1))
        .num_merge_threads(1)
        .build();
    let writer = index.writer_with_options(settings)?;
    let mut merges = LogMergePolicy::default();
    merges.set_del_docs_ratio_before_merge(MERGE_DELETED_SHARE);
    writer.set_merge_policy(Box::new(merges));
    Ok(writer)
}

/// Why an index cannot be opened.
enum Unusable {
    Damaged(String),
    /// Perhaps it can be later.
    Away(TantivyError),
}

impl From<TantivyError> for Unusable {
    fn from(error: TantivyError) -> Self {
        let io = match &error {
            TantivyError::IoError(io) => Some(io),
            TantivyError::OpenReadError(OpenReadError::IoError { io_error, .. }) => Some(io_error),
            TantivyError::LockFailure(..) => return Unusable::Away(error),
            _ => None,
        };
        // What the operating system refuses for now (open files, rights) is not damage.
        let away = io.is_some_and(|io| io.raw_os_error().is_some() && io.kind() != io::ErrorKind::NotFound);
        if away { Unusable::Away(error) } else { Unusable::Damaged(error.to_string()) }
    }
}

impl OpenIndex {
    fn open(
        path: &Path,
        layout: &Arc<Layout>,
        options: &Options,
        payload: Payload,
        thorough: bool,
    ) -> Result<OpenIndex, Unusable> {
        let index = Index::open_in_dir(path)?;
        if index.schema() != layout.schema {
            return Err(Unusable::Damaged("its fields are not those of its definition".to_owned()));
        }
        if thorough {
            // Without this list Tantivy neither checks nor removes any file.
            if !path.join(".managed.json").exists() {
                return Err(Unusable::Damaged(".managed.json is missing".to_owned()));
            }
            if let Some(file) = index.validate_checksum()?.into_iter().next() {
                return Err(Unusable::Damaged(format!("the checksum of {} is wrong", file.display())));
            }
        }
        let reader: IndexReader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
        let writer = new_writer(&index, options)?;
        let (path, layout, searcher) = (path.to_owned(), layout.clone(), reader.searcher());
        Ok(OpenIndex { path, layout, writer, reader, searcher, payload })
    }

    /// What the last commit says.
    pub(crate) fn payload(&self) -> &Payload {
        &self.payload
    }

    /// As of the last commit.
    pub(crate) fn searcher(&self) -> &Searcher {
        &self.searcher
    }

    /// Stages a document, instead of the one that has its id.
    pub(crate) fn upsert(&self, id: &str, document: TantivyDocument) -> Result<(), SinkError> {
        let operations = [UserOperation::Delete(self.id_term(id)), UserOperation::Add(document)];
        self.writer.run(operations).map(drop).map_err(|error| self.unavailable(&error))
    }

    /// Stages a deletion.
    pub(crate) fn delete(&self, id: &str) -> Result<(), SinkError> {
        let operations = [UserOperation::Delete(self.id_term(id))];
        self.writer.run(operations).map(drop).map_err(|error| self.unavailable(&error))
    }

    /// Stages the deletion of every document, committed or staged before this.
    pub(crate) fn truncate(&self) -> Result<(), SinkError> {
        self.writer.delete_query(Box::new(AllQuery)).map(drop).map_err(|error| self.unavailable(&error))
    }

    /// Makes what is staged durable together with `payload`, and visible to this index's searcher.
    pub(crate) fn commit(&mut self, payload: Payload) -> Result<(), SinkError> {
        self.check()?;
        let committed = (|| {
            let mut commit = self.writer.prepare_commit()?;
            commit.set_payload(&payload.to_json());
            commit.commit()?;
            self.reader.reload()
        })();
        committed.map_err(|error: TantivyError| self.unavailable(&error))?;
        self.searcher = self.reader.searcher();
        self.payload = payload;
        Ok(())
    }

    /// Whether the directory still holds the last commit of ours.
    pub(crate) fn check(&self) -> Result<(), SinkError> {
        match read_payload(&self.path)? {
            Ok(payload) if payload == self.payload => Ok(()),
            Ok(_) => Err(self.moved("another commit than the last one stands there")),
            Err(PayloadError::Unreadable(reason)) => Err(self.moved(&reason)),
            Err(PayloadError::Newer(format)) => Err(self.moved(&format!("its format is now {format}"))),
        }
    }

    /// The committed document of this id, as JSON.
    pub(crate) fn document(&self, id: &str) -> Result<Option<String>, SinkError> {
        document(&self.searcher, &self.layout, id).map_err(|error| self.unavailable(&error))
    }

    fn id_term(&self, id: &str) -> Term {
        Term::from_field_text(self.layout.id, id)
    }

    fn unavailable(&self, error: &TantivyError) -> SinkError {
        unavailable(&self.path, error)
    }

    fn moved(&self, what: &str) -> SinkError {
        SinkError::Moved(format!(
            "the search index {} changed under this process: {what}",
            self.path.display()
        ))
    }
}

/// The document of an id, as JSON.
pub(crate) fn document(searcher: &Searcher, layout: &Layout, id: &str) -> tantivy::Result<Option<String>> {
    match find(searcher, layout, id)? {
        Some(address) => stored_json(searcher, layout, address).map(Some),
        None => Ok(None),
    }
}

/// Where the document of an id is.
fn find(searcher: &Searcher, layout: &Layout, id: &str) -> tantivy::Result<Option<DocAddress>> {
    let term = Term::from_field_text(layout.id, id);
    for (segment, reader) in searcher.segment_readers().iter().enumerate() {
        let inverted = reader.inverted_index(layout.id)?;
        let Some(mut postings) = inverted.read_postings(&term, IndexRecordOption::Basic)? else { continue };
        while postings.doc() != TERMINATED {
            if !reader.is_deleted(postings.doc()) {
                return Ok(Some(DocAddress::new(segment as u32, postings.doc())));
            }
            postings.advance();
        }
    }
    Ok(None)
}

/// A document's JSON.
pub(crate) fn stored_json(searcher: &Searcher, layout: &Layout, at: DocAddress) -> tantivy::Result<String> {
    let document: TantivyDocument = searcher.doc(at)?;
    match document.get_first(layout.json).and_then(|value| value.as_str()) {
        Some(json) => Ok(json.to_owned()),
        None => Err(TantivyError::InternalError("a document without its JSON".to_owned())),
    }
}

/// Reads what the last commit in a directory says. Tantivy replaces the file by a rename, so it is never half.
pub(crate) fn read_payload(path: &Path) -> Result<Result<Payload, PayloadError>, SinkError> {
    #[derive(Deserialize)]
    struct Meta {
        payload: Option<String>,
    }
    let bytes = match fs::read(path.join("meta.json")) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Err(PayloadError::Unreadable("it is missing".to_owned())));
        }
        Err(error) => return Err(unavailable(path, &error)),
    };
    Ok(match serde_json::from_slice(&bytes) {
        Ok(Meta { payload: Some(payload) }) => Payload::from_json(&payload),
        Ok(Meta { payload: None }) => Err(PayloadError::Unreadable("it has no checkpoint".to_owned())),
        Err(error) => Err(PayloadError::Unreadable(error.to_string())),
    })
}

/// The path with something after its name.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(suffix);
    path.with_file_name(name)
}

pub(crate) fn remove_directory(path: &Path) -> Result<(), SinkError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(unavailable(path, &error)),
        _ => Ok(()),
    }
}

pub(crate) fn unavailable(path: &Path, error: &dyn std::error::Error) -> SinkError {
    SinkError::Unavailable(format!("the search index {} cannot be used: {error}", path.display()))
}
