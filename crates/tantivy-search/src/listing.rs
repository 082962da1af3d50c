//! All documents in the order of their ids, page by page.
//!
//! Ids are terms, and each segment has its terms sorted; the pages come from a merge of the segments' term
//! dictionaries. Between two pages documents come and go, but one that stays keeps its id and so its place: who
//! asks for the page after the last id he has seen misses no such document and sees none twice.

use std::sync::Arc;

use tantivy::schema::IndexRecordOption;
use tantivy::termdict::TermStreamer;
use tantivy::{DocAddress, DocSet, InvertedIndexReader, Searcher, SegmentReader, TERMINATED};

use crate::index::{Layout, stored_json};

/// The documents after the id `after`, without the first `offset` of them, at most `limit`, as JSON.
pub(crate) fn page(
    searcher: &Searcher,
    layout: &Layout,
    after: Option<&str>,
    offset: usize,
    limit: usize,
) -> tantivy::Result<Vec<String>> {
    let segments = searcher.segment_readers();
    let inverted: Vec<Arc<InvertedIndexReader>> =
        segments.iter().map(|segment| segment.inverted_index(layout.id)).collect::<Result<_, _>>()?;
    let mut cursors = Vec::new();
    for (place, (segment, inverted)) in segments.iter().zip(&inverted).enumerate() {
        let range = inverted.terms().range();
        let range = after.map_or(inverted.terms().range(), |after| range.gt(after));
        let mut cursor =
            Cursor { place: place as u32, segment, inverted, terms: range.into_stream()?, doc: 0 };
        if cursor.advance()? {
            cursors.push(cursor);
        }
    }
    let mut addresses = Vec::new();
    for count in 0..offset.saturating_add(limit) {
        let least = cursors.iter().enumerate().min_by(|(_, a), (_, b)| a.terms.key().cmp(b.terms.key()));
        let Some((least, _)) = least else { break };
        if count >= offset {
            addresses.push(DocAddress::new(cursors[least].place, cursors[least].doc));
        }
        if !cursors[least].advance()? {
            cursors.swap_remove(least);
        }
    }
    addresses.into_iter().map(|address| stored_json(searcher, layout, address)).collect()
}

/// Walks the ids of one segment whose documents are not deleted.
struct Cursor<'a> {
    place: u32,
    segment: &'a SegmentReader,
    inverted: &'a InvertedIndexReader,
    terms: TermStreamer<'a>,
    doc: u32,
}

impl Cursor<'_> {
    fn advance(&mut self) -> tantivy::Result<bool> {
        while self.terms.advance() {
            let info = self.terms.value();
            let mut postings = self.inverted.read_postings_from_terminfo(info, IndexRecordOption::Basic)?;
            while postings.doc() != TERMINATED {
                if !self.segment.is_deleted(postings.doc()) {
                    self.doc = postings.doc();
                    return Ok(true);
                }
                postings.advance();
            }
        }
        Ok(false)
    }
}
